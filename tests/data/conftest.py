import shutil

import pytest

from phi3_plugin.data import phi3_tokenizer
from tests.assets import assets_dir
from tests.data.tiny import MINI, PHI35, write_checkpoint

PUBLISHED = ("phi3-mini-4k-instruct", "phi3-mini-128k-instruct", "phi3.5-mini-instruct")
TINY = {"tiny-mini": MINI, "tiny-3.5": PHI35}


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def tokenizer(folder):
    return phi3_tokenizer(folder)


@pytest.fixture(
    scope="session",
    params=[*TINY, *(pytest.param(name, marks=pytest.mark.assets) for name in PUBLISHED)],
)
def supported(request, tmp_path_factory):
    """A checkpoint folder of each supported kind."""
    folder = tmp_path_factory.mktemp("supported") / request.param
    if request.param in TINY:
        return write_checkpoint(folder, chat_template=TINY[request.param])
    if assets_dir() is None:
        pytest.skip("the published tokenizers are not here: set PHI3_ASSETS")
    return shutil.copytree(assets_dir() / "models" / request.param, folder)
