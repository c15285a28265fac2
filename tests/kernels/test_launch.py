import pytest
from triton.runtime.errors import OutOfResources

from ranklet.kernels.launch import launch_fitted


class Device:
    """Has shared memory for some stages."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []

    def launch(self, stages: int) -> None:
        self.asked.append(stages)
        if stages > self.most:
            raise OutOfResources(stages, self.most, "shared memory")


def test_launches_with_fewer_stages_when_all_do_not_fit() -> None:
    device = Device(2)
    launch_fitted(device.launch, 4, device)
    launch_fitted(device.launch, 4, device)
    assert device.asked == [4, 3, 2, 2]


def test_other_variants_keep_their_stages() -> None:
    small, large = Device(1), Device(4)
    launch_fitted(small.launch, 3, small)
    launch_fitted(large.launch, 4, large)
    assert (small.asked[-1], large.asked) == (1, [4])


def test_a_kernel_that_fits_with_no_number_of_stages_is_an_error() -> None:
    device = Device(0)
    with pytest.raises(OutOfResources):
        launch_fitted(device.launch, 2, device)
