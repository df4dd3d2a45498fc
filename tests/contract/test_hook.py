"""The start-up hook: what it changes where torchtune is imported, and that it changes nothing else.

It runs in every process that imports torch, so each claim is checked in a process of its own.
"""

import json

import pytest

from tests.chosen import some
from tests.warm import run_python

# What a process can see of torch and torchao, torchtune aside.
SNAPSHOT = """
import json, sys
import torch, torchao, torchao.dtypes, torchao.quantization
print(json.dumps({
    "modules": sorted(sys.modules),
    "torchao": dir(torchao),
    "dtypes": dir(torchao.dtypes),
    "quantization": dir(torchao.quantization),
    "excepthook": sys.excepthook is sys.__excepthook__,
    "finders": [type(finder).__module__ for finder in sys.meta_path],
}))
"""

# torchtune as the hook must leave it; the last line proves that NF4 works through the alias.
USE_TORCHTUNE = """
import sys
import torch, torchtune.training, torchao.dtypes.nf4tensor
from torchtune import _recipe_registry as registry
from torchtune.modules.peft import LoRALinear
assert registry.__loader__ is registry.__spec__.loader
assert type(registry.__loader__).__module__ != "phi3_plugin.hook"
names = {c.name for r in registry.get_all_recipes() for c in r.configs}
assert "phi3_mini_lora" in names and not any(name.endswith(".yaml") for name in names)
assert sys.excepthook is sys.__excepthook__
linear = LoRALinear(256, 256, rank=4, alpha=8, quantize_base=True)
assert type(linear.weight) is torchao.dtypes.nf4tensor.NF4Tensor is torchao.dtypes.NF4Tensor
assert linear(torch.ones(1, 256)).isfinite().all()
print("torchtune works")
"""

# A torchtune of two lines, so that these tests need neither torch nor seconds.
FAKE_TORCHTUNE = """
import pathlib, sys, warnings
pathlib.Path("torchtune").mkdir()
for name in ("__init__", "part", "_recipe_registry"):
    pathlib.Path("torchtune", name + ".py").write_text("ran = True\\n")
sys.path.insert(0, ".")
from phi3_plugin import hook as autoload
"""

FAKE_TORCHAO = """
import sys, types
def module(name, **members):
    made = sys.modules[name] = types.ModuleType(name)
    made.__dict__.update(members, __path__=[])
    made.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    return made
from phi3_plugin import hook as autoload
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """What a process sees with the plugin, and that torchtune works in it then, as two lines."""
    return run_python(SNAPSHOT + USE_TORCHTUNE, tmp_path_factory.mktemp("with")).splitlines()


@pytest.mark.parametrize(
    "switch",
    some(["PHI3_PLUGIN_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"], {"PHI3_PLUGIN_AUTOLOAD"}),
)
def test_a_process_without_torchtune_sees_no_difference(fresh_python, snapshot, switch):
    with_plugin = json.loads(snapshot[0])
    without = json.loads(fresh_python(SNAPSHOT, **{switch: "0"}))
    ours = {"phi3_plugin", "phi3_plugin.hook"}
    assert ours <= set(with_plugin["modules"])
    for seen in (with_plugin, without):
        seen["modules"] = [name for name in seen["modules"] if name not in ours]
    assert "phi3_plugin.hook" in with_plugin["finders"]  # and a kill switch leaves torchtune alone
    with_plugin["finders"].remove("phi3_plugin.hook")
    assert with_plugin == without


def test_torchtune_works_where_torchao_was_imported_first(snapshot):
    assert snapshot[-1] == "torchtune works"


@pytest.mark.parametrize("first", some(["torch", "torchtune"], {"torchtune"}))
def test_torchtune_works_whichever_is_imported_first(fresh_python, first):
    fresh_python(f"import {first}\n{USE_TORCHTUNE}")


def test_install_takes_less_than_a_millisecond(fresh_python):
    code = """
import sys, time
from phi3_plugin import hook as autoload
def once():
    before = list(sys.meta_path)
    start = time.perf_counter()
    autoload.install()
    took = time.perf_counter() - start
    assert len(sys.meta_path) == len(before) + 1
    sys.meta_path[:] = before
    return took
print(min(once() for _ in range(200)))
"""
    assert float(fresh_python(code)) < 1e-3


def test_install_adds_one_finder_however_often_it_is_called(fresh_python):
    code = """
import sys
from phi3_plugin import hook as autoload
autoload.install()
once = list(sys.meta_path)
autoload.install()
assert sys.meta_path == once
"""
    fresh_python(code)


@pytest.mark.parametrize("broken", ["None", "()", "object()"])
@pytest.mark.parametrize("action", ["always", "error"])
def test_install_warns_and_returns_where_it_cannot_work(fresh_python, broken, action):
    code = f"""
import sys, warnings
from phi3_plugin import hook as autoload
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter({action!r})
    path, sys.meta_path = sys.meta_path, {broken}
    autoload.install()
    sys.meta_path = path
assert [str(w.message)[:12] for w in seen] == ["phi3_plugin:"] * ({action!r} == "always"), seen
"""
    fresh_python(code)


def test_a_failing_alias_or_registration_is_a_warning(fresh_python):
    # The registry of this torchtune has no get_all_recipes, and there is no torchao.
    code = f"""{FAKE_TORCHTUNE}
def missing():
    raise ModuleNotFoundError("no torchao")
autoload._alias_torchao = missing
autoload.install()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torchtune.part, torchtune._recipe_registry
assert torchtune.part.ran and torchtune._recipe_registry.ran
first, second = (str(w.message) for w in seen)
assert "no torchao" in first and "get_all_recipes" in second, (first, second)
"""
    fresh_python(code)


def test_other_finders_still_find_torchtune(fresh_python):
    # An editable install of torchtune may keep its files anywhere and bring a finder of its own.
    code = f"""{FAKE_TORCHTUNE}
from importlib.util import spec_from_file_location
pathlib.Path("torchtune/_recipe_registry.py").rename("moved.py")
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchtune._recipe_registry":
            return spec_from_file_location(name, "moved.py")
sys.meta_path.append(Editable)
autoload._alias_torchao = lambda: None
autoload.install()
acted = []
sys.meta_path[0].after["torchtune._recipe_registry"] = acted.append
import torchtune._recipe_registry as registry
assert acted == [registry] and registry.ran and "moved" in registry.__file__
assert registry.__spec__.loader is registry.__loader__
"""
    fresh_python(code)


def test_nothing_is_replaced_on_a_torchao_that_has_the_names(fresh_python):
    code = f"""{FAKE_TORCHAO}
module("torchao", __version__="0.15.0")
nf4 = module("torchao.dtypes.nf4tensor", NF4Tensor=1, to_nf4=2)
dtypes = module("torchao.dtypes", nf4tensor=nf4, NF4Tensor=1, to_nf4=2, TensorCoreTiledLayout=3)
new = {{"int4_weight_only": 4, "int8_dynamic_activation_int4_weight": 5}}
quantization = module("torchao.quantization", **new)
before = dict(vars(dtypes)), dict(vars(quantization)), set(sys.modules)
autoload._alias_torchao()
assert before == (vars(dtypes), vars(quantization), set(sys.modules))
"""
    fresh_python(code)


def test_missing_names_are_the_moved_module_and_stubs_that_explain(fresh_python):
    code = f"""{FAKE_TORCHAO}
module("torchao", __version__="0.18.0")
dtypes, quantization = module("torchao.dtypes"), module("torchao.quantization")
for name in ("quantize_", "quantize_.workflows", "quantize_.workflows.nf4"):
    module("torchao.quantization." + name)
moved = module(autoload._NF4_NEW, NF4Tensor=object(), to_nf4=object())
autoload._alias_torchao()
assert sys.modules["torchao.dtypes.nf4tensor"] is dtypes.nf4tensor is moved
assert dtypes.NF4Tensor is moved.NF4Tensor and dtypes.to_nf4 is moved.to_nf4
for stub in (dtypes.TensorCoreTiledLayout, quantization.int4_weight_only):
    try:
        stub(8)
    except NotImplementedError as error:
        print(error)
"""
    out = fresh_python(code)
    assert "torchao.dtypes.TensorCoreTiledLayout is not in torchao 0.18.0" in out
    assert "torchao.quantization.int4_weight_only is not in torchao 0.18.0" in out
