"""The names of KV caches that a command takes are those there are."""

from llmctl.inference.settings import KV_CACHES
from llmctl.model.cache import CACHES


def test_the_caches_that_can_be_named_exist():
    assert tuple(CACHES) == KV_CACHES
