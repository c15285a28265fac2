"""One S3 server for all tests of this folder: it takes a second to start, and so does the first client."""

from collections.abc import Iterator

import fsspec
import pytest

from tests.cluster.catalog.bucket import S3Bucket, bucket


@pytest.fixture(scope="session")
def served() -> Iterator[S3Bucket]:
    with bucket() as made:
        yield made


@pytest.fixture
def s3(served: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """Return a bucket that fsspec finds. Each test puts its adapters into folders with names of its own."""
    monkeypatch.setitem(fsspec.config.conf, "s3", served.settings)
    return served
