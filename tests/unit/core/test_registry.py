"""Plugins: loading, selecting by name, and what is said when either fails."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pluggy
import pytest

import moelab
from moelab.errors import ConfigError
from moelab.hookspecs import EXTENSION_POINTS, ROUTERS, plugin_hooks
from moelab.moe.contracts import MoEContext
from moelab.paths import Places
from moelab.registry import Registry

CONTEXT = MoEContext(8, 4, 2, 8, 16, 0, 1, 32)


@dataclass
class Options:
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if self.sharpness <= 0:
            raise ValueError("sharpness must be positive")


def build(options: Options, context: MoEContext) -> Any:
    """A router for tests."""
    if context.num_experts < 2:
        raise ConfigError("needs two experts")
    return (options.sharpness, context.num_experts)


Plugin = Callable[..., str]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Make a module that offers `component(name)`, and return its import name."""

    def make(module: str, name: str, **extra: Any) -> str:
        offered = types.ModuleType(module)
        build_here = types.FunctionType(build.__code__, build.__globals__, "build")
        build_here.__module__, build_here.__doc__ = module, build.__doc__
        hook = moelab.hookimpl(lambda: [moelab.component(name, Options, build_here, **extra)])
        offered.moelab_routers = hook  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, offered)
        return module

    return make


def test_a_plugin_is_selected_by_name_with_typed_options(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    assert registry.build(ROUTERS, {"name": "sharp", "sharpness": "2"}, CONTEXT, "model.moe.router") == (2.0, 4)


def test_defaults_are_written_out(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    assert registry.resolve(ROUTERS, {"name": "sharp"}, "x") == {"name": "sharp", "sharpness": 1.0}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"name": "shrap"}, ["x.name: no router 'shrap'", "did you mean 'sharp'", "Known: ", "sharp (mine)"]),
        ({}, ["x: no `name`", "sharp (mine)"]),
        ({"name": "sharp", "sharpnes": 1}, ["x.sharpnes", "'sharp' (mine)", "did you mean 'sharpness'"]),
        ({"name": "sharp", "sharpness": "very"}, ["x.sharpness", "very", "(mine)"]),
        ({"name": "sharp", "sharpness": -1}, ["'sharp' (mine)", "must be positive"]),
    ],
)
def test_a_wrong_node_is_one_message(plugin: Plugin, node: dict[str, Any], words: list[str]) -> None:
    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    with pytest.raises(ConfigError) as caught:
        registry.build(ROUTERS, node, CONTEXT, "x")
    for word in words:
        assert word in str(caught.value)


def test_a_check_that_needs_sizes_names_place_and_owner(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    single = MoEContext(8, 1, 1, 8, 16, 0, 1, 32)
    with pytest.raises(ConfigError, match=r"x \('sharp' of mine\): needs two experts"):
        registry.build(ROUTERS, {"name": "sharp"}, single, "x")


def test_two_plugins_of_one_name_are_both_named(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp"), plugin("theirs", "sharp")], entry_points=False)
    with pytest.raises(ConfigError, match="both mine and theirs"):
        registry.components(ROUTERS)


@pytest.mark.parametrize("order", [["mine", "theirs"], ["theirs", "mine"]])
def test_a_declared_override_replaces_in_any_order(plugin: Plugin, order: list[str]) -> None:
    plugin("mine", "sharp")
    plugin("theirs", "sharp", overrides=True)
    assert Registry(order, entry_points=False).components(ROUTERS)["sharp"].owner == "theirs"


def test_overriding_nothing_is_an_error(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp", overrides=True)], entry_points=False)
    with pytest.raises(ConfigError, match="overrides nothing"):
        registry.components(ROUTERS)


def test_registries_do_not_see_each_others_plugins(plugin: Plugin) -> None:
    Registry([plugin("mine", "sharp")], entry_points=False)
    assert "sharp" not in Registry(entry_points=False).components(ROUTERS)


def test_every_extension_point_has_a_builtin_with_a_line_of_doc() -> None:
    registry = Registry(entry_points=False)
    for point in EXTENSION_POINTS:
        components = registry.components(point)
        assert components, point.kind
        for component in components.values():
            assert component.summary.endswith((".", ")")), (point.kind, component.name, component.summary)


def leave() -> None:
    sys.exit()


HOOKS: dict[str, tuple[Any, str]] = {
    "a component": (
        lambda: moelab.component("sharp", Options, build),
        "returned a Component; it must return a",
    ),
    "a list of names": (lambda: ["sharp"], "returned a list with a str in it; it must return a list of"),
    "nothing": (lambda: None, "returned None; it must return a list of"),
    "an error": (
        lambda: moelab.component("sharp", dict, build),
        "raised TypeError: component 'sharp': options must be a",
    ),  # type: ignore[arg-type,type-var]
    "an end of the process": (leave, "raised SystemExit: SystemExit"),
}


@pytest.mark.parametrize(("hook", "words"), HOOKS.values(), ids=HOOKS)
def test_a_hook_that_answers_otherwise_is_told_with_its_line(
    monkeypatch: pytest.MonkeyPatch, hook: Any, words: str
) -> None:
    module = types.ModuleType("mine")
    hook.__module__ = "mine"
    module.moelab_routers = moelab.hookimpl(hook)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    registry = Registry(["mine"], entry_points=False)
    with pytest.raises(ConfigError) as caught:
        registry.components(ROUTERS)
    assert str(caught.value).startswith("plugins: moelab_routers of mine: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import moelab\n\nx = undefined\n", "NameError: name 'undefined' is not defined (broken_lab.py:3)"),
        ("def f(:\n", "(broken_lab.py:1)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (broken_lab.py:1)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "broken_lab.py").write_text(text)
    with pytest.raises(ConfigError, match=r"plugins: cannot import 'broken_lab'") as caught:
        Registry(["broken_lab"], entry_points=False, places=Places(search=(tmp_path,)))
    assert words in str(caught.value)


def test_the_end_of_a_process_that_a_constructor_or_its_options_ask_for_is_told(plugin: Plugin) -> None:
    """sys.exit() would end the command with code 0, as if all were done."""

    class Leaving:
        layer_id = None

        @property
        def num_experts(self) -> int:
            sys.exit()

    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    with pytest.raises(ConfigError, match=r"^x: router 'sharp' of mine: raised SystemExit"):
        registry.build(ROUTERS, {"name": "sharp"}, Leaving(), "x")  # type: ignore[arg-type]

    @dataclass
    class Refusing:
        def __post_init__(self) -> None:
            sys.exit()

    module = types.ModuleType("other")
    module.moelab_routers = moelab.hookimpl(lambda: [moelab.component("dull", Refusing, build)])  # type: ignore[attr-defined]
    registry.manager.register(module)
    with pytest.raises(ConfigError, match=r"^x: 'dull' \(.*\): its options raised SystemExit"):
        registry.select(ROUTERS, {"name": "dull"}, "x")


class Many:
    """Whatever may offer a hook, and what only looks as if."""

    @moelab.hookimpl
    def moelab_routers(self) -> list[Any]:
        return []

    @staticmethod
    @moelab.hookimpl
    def moelab_activations() -> list[Any]:
        return []


class Tripwire:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


def _module(**names: Any) -> types.ModuleType:
    module = types.ModuleType("odd")
    vars(module).update(names)
    return module


def _hooks(manager: pluggy.PluginManager) -> dict[str, list[tuple[str, str, bool]]]:
    """{hook: (plugin, function, whether tried first)}, in order."""
    return {
        name: [(one.plugin_name, one.function.__qualname__, one.tryfirst) for one in hook.get_hookimpls()]
        for name, hook in vars(manager.hook).items()
    }


def test_the_hooks_that_are_found_are_those_that_pluggy_finds() -> None:
    """In every built-in, in modules of every sort of name, in classes and in objects."""
    registry = Registry(entry_points=False)
    plain = pluggy.PluginManager("moelab")
    plain.add_hookspecs(plugin_hooks())
    for name, plugin in registry.manager.list_name_plugin():
        plain.register(plugin, name=name)
    assert sum(map(len, _hooks(plain).values())) >= len(plain.list_name_plugin()) > 100
    first = moelab.hookimpl(lambda: [], tryfirst=True)
    odd = {
        "function": _module(moelab_routers=first, other=moelab.hookimpl(lambda: [], specname="moelab_activations")),
        "method": _module(moelab_routers=Many().moelab_routers, bare=Many().__init__),
        "static": _module(moelab_routers=staticmethod(first), moelab_activations=moelab.hookimpl(staticmethod(first))),
        "unmarked": _module(moelab_routers=lambda: [], wire=Tripwire(), kind=Many, number=3, part=partial(first)),
        "class": Many,
        "object": Many(),
    }
    for name, plugin in odd.items():
        for manager in (registry.manager, plain):
            manager.register(plugin, name=name)
    assert _hooks(registry.manager) == _hooks(plain)
    assert {"function", "method", "static", "object"} <= {name for name, *_ in _hooks(plain)["moelab_routers"]}


def test_pluggy_is_asked_of_names_that_may_be_hooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(pluggy.PluginManager, "parse_hookimpl_opts", lambda self, plugin, name: asked.append(name))
    Registry(entry_points=False)
    hooks = {point.hook for point in EXTENSION_POINTS}
    assert hooks & set(asked) and set(asked) <= hooks


def test_what_a_constructor_raises_is_told_and_a_shortage_is_left_alone(plugin: Plugin) -> None:
    registry = Registry([plugin("mine", "sharp")], entry_points=False)
    with pytest.raises(ConfigError, match=r"^x: router 'sharp' of mine: raised AttributeError: 'int' object has no"):
        registry.build(ROUTERS, {"name": "sharp"}, 3, "x")  # type: ignore[arg-type]

    class Greedy:
        @property
        def num_experts(self) -> int:
            raise MemoryError

    with pytest.raises(MemoryError):
        registry.build(ROUTERS, {"name": "sharp"}, Greedy(), "x")  # type: ignore[arg-type]


def test_the_built_in_plugins_are_told_as_one_package_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """From no list of what is installed, which takes a tenth of a second to read."""
    monkeypatch.setattr("moelab.registry.packages_distributions", lambda: pytest.fail("it was read"))
    assert Registry(entry_points=False).versions() == {"moelab": moelab.__version__}
