import pytest

from tests.own import tiny_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny checkpoint and 40 chats, made once for a file of tests."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), 40)


@pytest.fixture
def cwd(inputs, tmp_path):
    """A folder of a test's own that has them."""
    for name in ("base", "rows.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path
