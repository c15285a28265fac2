"""A running application for tests: real HTTP, the official openai client, and Ray's own list of processes."""

import base64
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ranklet.cluster.command.local_cluster import LocalCluster
from tests.assets.families import make_family
from tests.assets.oracle import Prompt, reference_embedding

ROOT = Path(__file__).parents[2]
BASE = "demo-base"
TIMEOUT_S = 240.0  # many times as long as with idle cores: it only ends what hangs
_ALIVE = ("RUNNING", "UPDATING")

Vectors = npt.NDArray[np.float32]


@dataclass
class Service:
    """One cluster with its model, and an adapters folder that tests may write to."""

    cluster: LocalCluster
    model_dir: Path
    adapters: Path
    content: dict[str, Any]
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.cluster.state.base_url, timeout=TIMEOUT_S, trust_env=False)

    @property
    def url(self) -> str:
        return self.cluster.state.base_url

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S)

    def post(self, model: str | None, given: Any, **fields: Any) -> httpx.Response:
        named = {} if model is None else {"model": model}
        return self.http.post("/v1/embeddings", json={**named, "input": given, **fields})

    def embed(self, model: str | None, given: Any, **fields: Any) -> Vectors:
        """Return float32 [prompts, dimensions]. The answer must be 200."""
        answer = self.post(model, given, **{"encoding_format": "base64", **fields})
        assert answer.status_code == 200, answer.text
        return vectors_of(answer)

    def expected(self, adapter: str | None, prompts: list[Prompt], dimensions: int | None = None) -> Vectors:
        """Return the embeddings that transformers and PEFT compute."""
        folder = self.adapters / adapter if adapter else None
        return reference_embedding(self.model_dir, folder, prompts, dimensions=dimensions)

    def processes(self, deployment: str) -> dict[str, int]:
        """Return the process id of each running replica of a deployment, by the replica's id."""
        applications = self.cluster.applications()
        assert applications is not None, "Serve's REST API does not answer"
        replicas = applications["ranklet"]["deployments"].get(deployment, {}).get("replicas", [])
        return {replica["replica_id"]: replica["pid"] for replica in replicas if replica["state"] in _ALIVE}

    def targets(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.http.get("/metrics/targets").raise_for_status().json()
        return groups

    def samples(self, role: str, **labels: str) -> Mapping[str, float]:
        """Return the samples of all processes of a role whose labels include `labels`, summed by name."""
        return summed_samples([each["targets"][0] for each in self.targets() if each["labels"]["role"] == role], labels)

    def deploy(self, user_config: Mapping[str, Any] | None, *, of_replicas: Mapping[str, Any] | None = None) -> None:
        """Deploy the file with these contents of `user_config`, which may be faulty; None leaves it out."""
        gateway, replica = (dict(each) for each in self.content["applications"][0]["deployments"])
        assert (gateway["name"], replica["name"]) == ("Gateway", "Replica")
        for deployment, content in ((gateway, user_config), (replica, of_replicas)):
            if content is not None:
                deployment["user_config"] = content
        application = {**self.content["applications"][0], "deployments": [gateway, replica]}
        self.cluster.deploy({**self.content, "applications": [application]})

    def scale(self, deployment: str, count: int) -> None:
        """Deploy the file with another number of gateways or replicas, if it has not this number yet."""
        (found,) = (each for each in self.content["applications"][0]["deployments"] if each["name"] == deployment)
        if found.get("num_replicas") != count:
            found["num_replicas"] = count
            self.deploy(None)


def summed_samples(targets: Iterable[str], labels: Mapping[str, str]) -> Mapping[str, float]:
    """Return the samples that these targets export and whose labels include `labels`, summed by name."""
    summed: dict[str, float] = {}
    for target in targets:
        text = httpx.get(f"http://{target}/metrics", timeout=TIMEOUT_S, trust_env=False).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if labels.items() <= sample.labels.items():
                    summed[sample.name] = summed.get(sample.name, 0.0) + sample.value
    return summed


@contextmanager
def serving(content: dict[str, Any], folder: Path, cluster: LocalCluster | None = None) -> Iterator[Service]:
    """Serve a configuration of `local_configuration` in its own cluster. Its file is written to `folder`."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    arguments = content["applications"][0]["args"]
    with cluster or LocalCluster(http_port=0, report=print) as started:
        state = started.start(config)
        content["http_options"]["port"] = int(state.base_url.rpartition(":")[2])
        service = Service(started, Path(arguments["base"]["model_dir"]), Path(arguments["adapters_dir"]), content)
        with service.http:
            yield service


def local_configuration(model_dir: Path, adapters: Path) -> dict[str, Any]:
    """Return deploy/local.yaml with the tests' model and adapters."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
    arguments = content["applications"][0]["args"]
    arguments["base"]["model_dir"], arguments["adapters_dir"] = str(model_dir), str(adapters)
    return content


def own_configuration(model_dir: Path, adapters_dir: Path, folder: Path) -> dict[str, Any]:
    """Return deploy/local.yaml with a copy of the adapters in `folder`/adapters, which a test may write to."""
    shutil.copytree(adapters_dir, folder / "adapters")
    return local_configuration(model_dir, folder / "adapters")


def text_configuration(folder: Path) -> dict[str, Any]:
    """Make a small Llama model and adapters in a folder. Returns deploy/local.yaml with them."""
    make_family(folder, "llama")
    return local_configuration(folder / "model", folder / "adapters")


def vectors_of(answer: httpx.Response) -> Vectors:
    """Return an answer in base64 as float32 [prompts, dimensions]."""
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer.json()["data"]]
    return np.stack(rows)


def assert_close(vectors: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    np.testing.assert_allclose(np.asarray(vectors), np.asarray(expected), rtol=0.0, atol=1e-5)  # order of float32 sums


def eventually(event: str, check: Callable[[], bool], *, poll_s: float = 0.2) -> None:
    """Wait until `check` returns True. Fails the test after `TIMEOUT_S`."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not check():
        assert time.monotonic() < deadline_s, f"did not happen within {TIMEOUT_S:g} s: {event}"
        time.sleep(poll_s)
