"""Shared by the tests of commands."""

import os

import pytest


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache of its own for a module."""
    before = os.environ.get("JAXEDIT_CACHE")
    os.environ["JAXEDIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("JAXEDIT_CACHE")
    if before is not None:
        os.environ["JAXEDIT_CACHE"] = before
