"""Descriptions of adapters take bounded memory in a gateway."""

import asyncio
from typing import Any

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.descriptions import AdapterDescriptions
from ranklet.cluster.ingress.model_tokens import Tokenizers
from ranklet.cluster.message import AdapterText
from tests.cluster.ingress.parts import FakeTokenizer


class _Replicas:
    async def text_description(self, adapter: AdapterLocation) -> AdapterText:
        return AdapterText("v1", adapter.name * 1000, {})


def test_the_oldest_descriptions_make_room_for_large_ones() -> None:
    tokenizer: Any = FakeTokenizer()
    descriptions = AdapterDescriptions(_Replicas(), Tokenizers(tokenizer), most_bytes=5000)
    small, other, wide = (AdapterLocation(name, "/folder") for name in ("a", "b", "wide"))

    def known() -> list[bool]:
        return [descriptions.known(each) is not None for each in (small, other, wide)]

    for adapter in (small, other):
        asyncio.run(descriptions.describe(adapter))
    assert known() == [True, True, False]
    asyncio.run(descriptions.describe(wide))
    assert known() == [False, False, True], "4,000 bytes leave no room for another"
    asyncio.run(descriptions.describe(AdapterLocation("larger than all", "/folder")))
    assert known() == [False, False, False]
