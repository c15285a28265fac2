"""Rounds counts up to a power of two or four, so that batches of similar size share kernels and CUDA graphs."""


def power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def power_of_four(count: int) -> int:
    return 1 << (max(count - 1, 0).bit_length() + 1) // 2 * 2
