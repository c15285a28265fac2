"""The paths of requests for scores."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from ranklet.cluster.ingress.classify import ClassifyTask
from ranklet.cluster.ingress.descriptions import AdapterDescriptions
from ranklet.cluster.ingress.rerank import RerankTask, ScoreTask
from ranklet.cluster.ingress.scoring_task import ScoringTask

_Parse = Callable[[AdapterDescriptions, bytes], ScoringTask[Any]]
SCORING_PATHS: Final[Mapping[_Parse, tuple[str, ...]]] = {
    ClassifyTask.parse: ("/classify",),
    RerankTask.parse: ("/v1/rerank", "/rerank", "/v2/rerank"),
    ScoreTask.parse: ("/score", "/v1/score"),
}
