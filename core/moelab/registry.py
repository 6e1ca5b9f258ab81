"""Loads plugins and turns `{name: ..., options...}` into a built component."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields
from importlib.metadata import EntryPoint, PackageNotFoundError, packages_distributions, version
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pluggy
from omegaconf import MISSING as REQUIRED

from moelab import __version__
from moelab.components import Component
from moelab.config.stored import filled
from moelab.config.typed import OPTIONS, KeyProblem
from moelab.errors import ConfigError, UserError, near
from moelab.hookspecs import EXTENSION_POINTS, MARK, PROJECT, BuiltT, ContextT, ExtensionPoint, plugin_hooks
from moelab.installed import installed_plugins, load_plugin, may_offer
from moelab.paths import Places
from moelab.plugin_faults import ANYTHING, PluginPart, article, place_in, place_of, quoted
from moelab.plugin_modules import check_hooks, import_plugin
from moelab.shortage import shortage


class Registry:
    """The plugins of one run, never a module global: two runs in one process can't see each other's.

    `plugins` are module names, installed or in one of `places`; `entry_points`: whether installed packages' are loaded
    too, or which of `installed_plugins()`. A run that needs only some extension points names
    them as `points`: neither built-ins nor installed packages that offer none of them are imported, so that upcycling's
    workers do without torch.
    """

    def __init__(
        self,
        plugins: Iterable[str] = (),
        entry_points: bool | Collection[str] = True,
        places: Places | None = None,
        *,
        points: Collection[ExtensionPoint[Any, Any]] = EXTENSION_POINTS,
    ) -> None:
        self.manager = _PluginManager(PROJECT)
        self.manager.add_hookspecs(plugin_hooks())
        self.modules: set[str] = set()  # whose code is in: built-in, installed or named
        self._versions: dict[str, str] | None = None
        self.left_out: list[str] = []  # entry points that offer nothing at `points`
        self._ours = [path for point in points for path in builtin_modules(point)]
        for path in self._ours:
            self._register(importlib.import_module(path), path)
        installed = installed_plugins() if entry_points else {}
        wanted = installed if isinstance(entry_points, bool) else entry_points
        self._load_entry_points({name: installed[name] for name in installed if name in wanted}, points)
        places = places or Places()
        for path in plugins:
            module = import_plugin(str(path), places.of(str(path)))
            check_hooks(module, str(path), [point.hook for point in EXTENSION_POINTS])
            self._register(module, str(path))
        try:
            self.manager.check_pending()  # a misspelt hook is an error, not silence
        except pluggy.PluginValidationError as error:
            raise ConfigError(f"plugins: {error}{_near_hook(str(error))}") from error

    def components(self, point: ExtensionPoint[ContextT, BuiltT]) -> dict[str, Component[ContextT, BuiltT]]:
        """{name: component} in alphabetical order, replacements already in place."""
        offered = [c for hook in getattr(self.manager.hook, point.hook).get_hookimpls() for c in _answer(point, hook)]
        known: dict[str, Component[ContextT, BuiltT]] = {}
        for offer in sorted(offered, key=lambda c: (c.overrides, c.name, c.owner)):  # what may be replaced comes first
            rival = known.get(offer.name)
            if rival and rival.overrides == offer.overrides:
                raise ConfigError(
                    f"plugins: {point.kind} '{offer.name}' comes from both {rival.owner} and {offer.owner}; "
                    "rename one, or declare exactly one with overrides=True"
                )
            if offer.overrides and not rival:
                raise ConfigError(f"plugins: {offer.owner}: {point.kind} '{offer.name}' overrides nothing")
            known[offer.name] = offer
        return dict(sorted(known.items()))

    def build(
        self, point: ExtensionPoint[ContextT, BuiltT], node: Mapping[str, Any], context: ContextT, where: str
    ) -> BuiltT:
        """Build what `node["name"]` selects; `where` is its path in the config, for messages.

        Raises ConfigError with the place in the plugin for whatever it raises.
        """
        chosen, options = self.select(point, node, where)
        try:
            return chosen.build(options, context)
        except ConfigError as error:  # a check that needed the context
            raise ConfigError(f"{where} ('{chosen.name}' of {chosen.owner}): {error}") from error
        except UserError:  # of the data, say, which names its file
            raise
        except ANYTHING as error:
            part = _part(point, chosen, where, getattr(context, "layer_id", None))
            if part.ours or shortage(error):
                raise
            raise part.raised(error) from error

    def part(
        self, point: ExtensionPoint[Any, Any], node: Mapping[str, Any], where: str, layer_id: int | None = None
    ) -> PluginPart:
        """How messages call what `node` selects."""
        return _part(point, self.select(point, node, where)[0], where, layer_id)

    def resolve(self, point: ExtensionPoint[ContextT, BuiltT], node: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The node with every default written out: what is stored beside the run."""
        chosen, options = self.select(point, node, where)
        return {"name": chosen.name, **asdict(options)}

    def differing(self, point: ExtensionPoint[Any, Any], node: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a resolved node that are not at their component's defaults; those without one always."""
        known = {field.name: _default(field) for field in fields(self.components(point)[node["name"]].options)}
        return {key: value for key, value in node.items() if key != "name" and value != known.get(key, MISSING)}

    def filled(self, point: ExtensionPoint[Any, Any], part: Mapping[str, Any]) -> dict[str, Any] | None:
        """A stored part with the defaults of the options that it lacks; None where there is no such plugin."""
        chosen = self.components(point).get(part["name"])
        return None if chosen is None else filled(part, chosen.options)

    def select(
        self, point: ExtensionPoint[ContextT, BuiltT], node: Mapping[str, Any], where: str
    ) -> tuple[Component[ContextT, BuiltT], Any]:
        """The component that `node` names, and its options, typed and range-checked."""
        known = self.components(point)
        listing = "Known: " + ", ".join(f"{c.name} ({c.owner})" for c in known.values())
        if self.left_out:
            listing += f". Not imported, as no hook for this command stands in its source: {', '.join(self.left_out)}"
        given = {str(key): value for key, value in node.items()}
        name = given.pop("name", None)
        if name is None:
            raise ConfigError(f"{where}: no `name`. {listing}")
        if name not in known:
            raise ConfigError(f"{where}.name: no {point.kind} '{name}'{near(name, known)} {listing}")
        return known[name], _options(known[name], given, where)

    def versions(self) -> dict[str, str]:
        """{distribution or module: version} of every plugin that is loaded; the built-in ones are moelab's."""
        if self._versions is None:  # every checkpoint asks
            self._versions = self._find_versions()
        return dict(self._versions)

    def _find_versions(self) -> dict[str, str]:
        found = {"moelab": __version__} if self._ours else {}
        # Ours are told from a source tree too, where no distribution knows them.
        others = [(name, plugin) for name, plugin in self.manager.list_name_plugin() if name not in self._ours]
        owners = packages_distributions() if others else {}  # reads the file list of all that is installed
        for name, plugin in others:
            top = getattr(plugin, "__name__", name).split(".")[0]  # an entry point is registered under its own name
            distribution = owners.get(top, [top])[0]
            try:
                found[distribution] = version(distribution)
            except PackageNotFoundError:
                found[name] = "no distribution"
        return dict(sorted(found.items()))

    def _load_entry_points(
        self, installed: Mapping[str, EntryPoint], points: Collection[ExtensionPoint[Any, Any]]
    ) -> None:
        """Those that may offer one of `points`: a heavy package that offers others costs this run nothing."""
        hooks = [point.hook for point in points]
        for name, entry_point in installed.items():
            if len(hooks) < len(EXTENSION_POINTS) and not may_offer(entry_point, hooks):
                self.left_out.append(name)
                continue
            self._register(load_plugin(name, entry_point), name)

    def _register(self, module: ModuleType, name: str) -> None:
        self.modules |= {name, module.__name__} if isinstance(module, ModuleType) else {name}
        if not self.manager.is_registered(module):
            self.manager.register(module, name=name)


class _PluginManager(pluggy.PluginManager):
    """pluggy's, but that it looks closer at those names of a module alone that may be hooks.

    pluggy looks each of thousands of names up along the bases of its module, most of the time that a registry took.
    """

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """As pluggy has it: the options of the marker on what is called so; None where there is none."""
        if type(plugin) is ModuleType and name in vars(plugin):
            value = vars(plugin)[name]
            marked = isinstance(value, FunctionType) and hasattr(value, MARK)
            if not marked and not isinstance(value, MethodType | staticmethod | classmethod):
                return None
        return super().parse_hookimpl_opts(plugin, name)


def sound_plugins() -> tuple[list[str], dict[str, str]]:
    """(the entry points that can be used together, {one that can't: why}), each tried beside those before it."""
    sound: list[str] = []
    faults = {}
    for name in installed_plugins():
        try:
            registry = Registry((), [*sound, name])
            for point in EXTENSION_POINTS:
                registry.components(point)
            sound.append(name)
        except UserError as error:
            faults[name] = str(error)
    return sound, faults


def builtin_modules(point: ExtensionPoint[Any, Any]) -> list[str]:
    """The built-in plugins of a kind: every module of its package, but for those with a leading underscore.

    Found by looking, so that a new one is a file and nothing else. A package that is not installed has none: core
    stands alone.
    """
    try:
        package = importlib.import_module(point.builtins)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{point.builtins}.".startswith(f"{error.name}."):
            raise
        return []
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return [f"{point.builtins}.{name}" for name in names if not name.startswith("_")]


def _default(field: Field[Any]) -> Any:
    """Of a component's option; MISSING where it must be given."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return MISSING if field.default == REQUIRED else field.default


def _options(chosen: Component[Any, Any], given: dict[str, Any], where: str) -> Any:
    legal = [f.name for f in fields(chosen.options)]
    for key in given:
        if key not in legal:
            raise ConfigError(
                f"{where}.{key}: '{chosen.name}' ({chosen.owner}) has no such option"
                f"{near(key, legal)} It takes: {', '.join(legal) or 'nothing'}"
            )
    try:
        return OPTIONS.build(chosen.options, given, (where,))  # also runs the dataclass's own __post_init__ checks
    except KeyProblem as error:
        raise ConfigError(f"{error.key}: '{chosen.name}' ({chosen.owner}): {error.problem}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: '{chosen.name}' ({chosen.owner}): {error}") from error
    except ANYTHING as error:  # of its __post_init__
        raise ConfigError(
            f"{where}: '{chosen.name}' ({chosen.owner}): its options raised {type(error).__name__}: {quoted(error)}"
            f"{place_in(error, chosen.owner)}"
        ) from error


def _part(point: ExtensionPoint[Any, Any], chosen: Component[Any, Any], where: str, layer_id: int | None) -> PluginPart:
    return PluginPart(
        point.kind, chosen.name, chosen.owner, where, layer_id, ours=f"{chosen.owner}.".startswith(f"{point.builtins}.")
    )


def _answer(point: ExtensionPoint[Any, Any], hook: pluggy.HookImpl) -> list[Component[Any, Any]]:
    """The components that one plugin offers. ConfigError for an answer that is no list of them."""
    owner = getattr(hook.plugin, "__name__", hook.plugin_name)
    wanted = "it must return a list of moelab.component(...)"
    try:
        answer = hook.function()
    except ANYTHING as error:
        raise ConfigError(
            f"plugins: {point.hook} of {owner}: raised {type(error).__name__}: {quoted(error)}{place_in(error, owner)}"
        ) from error
    if not isinstance(answer, list | tuple):
        raise ConfigError(
            f"plugins: {point.hook} of {owner}: returned {article(answer)}; {wanted}{place_of(hook.function)}"
        )
    for item in answer:
        if not isinstance(item, Component):
            raise ConfigError(
                f"plugins: {point.hook} of {owner}: returned a list with {article(item)} in it; {wanted}"
                f"{place_of(hook.function)}"
            )
    return list(answer)


def _near_hook(message: str) -> str:
    words = message.split("'")
    hooks = [point.hook for point in EXTENSION_POINTS]
    return f" (hook{near(words[1], hooks)})" if len(words) > 1 else ""
