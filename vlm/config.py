"""From YAML files and `key=value` overrides to one frozen, validated value, with errors of one line.

Hydra's compose API knows groups, defaults lists and the override grammar; pydantic knows types, ranges and variants.
The YAML files hold only departures from the Python defaults.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar, Union

import pydantic
import yaml
from pydantic import ConfigDict, Field

from vlm.errors import UserError

if TYPE_CHECKING:  # Hydra takes longer to import than everything else here, and most importers never compose
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

FINGERPRINT_FORMAT = 3
"""Enters every fingerprint. Raise it when a default changes: old fingerprints would otherwise mean new values."""

KeyPath = tuple[str | int, ...]
C = TypeVar("C", bound="Config")


class ConfigError(UserError):
    """A configuration that cannot be used. One line that names the dotted path and, if there is one, the near name."""


class Config(pydantic.BaseModel):
    """Base of all configuration: frozen, with unknown keys and wrong types refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[str, ...]] = ()  # fields of which an override that sets one drops the others


class _ReferenceMarker:
    """Marks a path as the folder of another run; `fingerprint` looks for it."""


RunReference = Annotated[Path, _ReferenceMarker()]
"""The folder of another run, or a file of weights. A name that ends in a fingerprint stands for the run."""


def not_identity(default: Any, **constraints: Any) -> Any:
    """A pydantic field that does not decide the numbers (folders, devices, logging): `fingerprint` leaves it out."""
    return Field(default, json_schema_extra={"identity": False}, **constraints)


def always_identity(default: Any) -> Any:
    """A pydantic field that `fingerprint` counts even at its default: what runs did before it was there differs."""
    return Field(default, json_schema_extra={"identity": "always"})


class CustomConfig(Config):
    """Code from outside the project: an importable class and the options that it is built with."""

    type: Literal["custom"] = "custom"
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:Class")
    options: dict[str, Any] = {}

    def load(self) -> Any:
        """The class that `target` names."""
        module_name, _, name = self.target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(f"target {self.target!r}: cannot import {module_name} ({error})") from error
        if not hasattr(module, name):
            near = did_you_mean(name, [found for found in vars(module) if not found.startswith("_")])
            raise ConfigError(f"target {self.target!r}: {module_name} has no {name!r}. {near}")
        return getattr(module, name)

    def build(self, *arguments: Any) -> Any:
        """The class called with what its family is given, and with the options."""
        return self.load()(*arguments, **self.options)


def did_you_mean(word: str, candidates: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The near name, if there is one, and all names: "Did you mean 'timm'? Available: timm, tiny"."""
    names = list(candidates)
    if not names:
        return ""
    begun = [name for name in names if word and name.startswith(word)]
    near = difflib.get_close_matches(word, names, n=1) or begun
    question = f"Did you mean {show(near[0])}? " if near else ""
    return f"{question}Available: {', '.join(names)}"


# --- Compose: files and overrides to a value -------------------------------------------------------------------------


def default_config_folder() -> Path:
    """The `configs/` that came with the package: inside it in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def available_configs(config_folder: Path | None = None) -> list[str]:
    """Names of the configs that `compose` finds, the user's own folder included."""
    return _options(_search_folders(config_folder), "")


@dataclass(frozen=True)
class Setting:
    """A value for one key, as the override `key=value` sets it; or, with `is_delete`, what `~key` does."""

    key: str
    value: Any = None
    is_delete: bool = False

    def __str__(self) -> str:
        return f"~{self.key}" if self.is_delete else f"{self.key}={written(self.value)}"


def written(value: Any) -> str:
    """A value of YAML in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(written(inner) for inner in value) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value)
        if is_word and value.lower() not in ("true", "false", "null", "nan", "inf"):
            return value
        # Hydra reads \' as a quote, and \\ as a backslash only where backslashes stand before a quote.
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        return f"'{escaped}{chr(92) * trailing}'"
    return json.dumps(value)


def compose(
    name: str | None, overrides: Sequence[str | Setting], schema: type[C], config_folder: Path | None = None
) -> C:
    """The config `name` with `overrides` applied, validated into `schema`. `config_folder` is searched first.

    Without a name: the Python defaults with `overrides` applied.

    An override is Hydra's: `group=option` chooses a file, `key=value` (or `+key=value`) sets a value whether or not a
    file has the key, and `~key` goes back to the Python default. To choose another variant (`encoder.type=tiny`)
    drops what the files said of the former one. Interpolations see what files and overrides set, not Python defaults.
    """
    from omegaconf import OmegaConf

    folders = _search_folders(config_folder) if name is not None else []
    if name is not None and not any((folder / f"{name}.yaml").is_file() for folder in folders):
        raise ConfigError(f"unknown config {name!r}. {did_you_mean(name, _options(folders, ''))}")
    choices, settings = _split_overrides(overrides, _groups(folders))
    composed, files = _hydra_compose(name, choices, folders) if name is not None else (OmegaConf.create({}), list)
    for setting in settings:
        _apply(composed, setting, schema)
    tree = _resolve(composed)
    from_overrides = {setting.key for setting in settings}
    return _validate(tree, schema, lambda path: _source_file(path, files(), from_overrides))


class _NeedsOmegaConf(Exception):
    """A tree that is more than plain keys and values."""


class Composer(Generic[C]):
    """`compose` for thousands of values that differ in little, at a fraction of a millisecond each.

    Files are read once for each choice of them, and each section of the value is validated once for each content.
    What is rare (text around an interpolation, keys inside of lists) and what is wrong goes to `compose`.
    """

    def __init__(self, schema: type[C], config_folder: Path | None = None) -> None:
        self.schema = schema
        self.config_folder = config_folder
        self.folders = _search_folders(config_folder)
        self.groups = _groups(self.folders)
        self.parse = cache(_parse_override)
        self.alternatives = cache(lambda section, field: _alternatives(section, field, schema))
        self.bases: dict[tuple[str, ...], dict[str, Any]] = {}  # composed files by config and choices
        self.texts: dict[int, tuple[Any, str]] = {}  # sections of the bases by their `id`, which they keep alive
        self.sections: dict[tuple[str, str], Any] = {}  # validated sections by name and text

    def compose(self, name: str, overrides: Sequence[str | Setting]) -> C:
        """What `compose` gives, with equal sections of all values being one object."""
        choices, settings = _split_overrides(overrides, self.groups, self.parse)
        base = self._base(name, choices)
        if base is not None:
            try:
                tree = base
                for setting in settings:
                    tree = self._applied(tree, setting)
                return self.schema.model_validate({key: self._section(key, tree) for key in tree})
            except (_NeedsOmegaConf, pydantic.ValidationError):
                pass
        return compose(name, overrides, self.schema, self.config_folder)

    def _base(self, name: str, choices: Sequence[Override]) -> dict[str, Any] | None:
        """The composed files as plain values, not yet resolved; None where they cannot be composed."""
        from omegaconf import OmegaConf

        key = (name, *(str(choice.input_line) for choice in choices))
        if key not in self.bases:
            if name not in _options(self.folders, ""):
                return None
            base = OmegaConf.to_container(_hydra_compose(name, choices, self.folders)[0])
            assert isinstance(base, dict)
            self.bases[key] = typing.cast("dict[str, Any]", base)
            self.texts |= {id(section): (section, json.dumps(section)) for section in base.values()}
        return self.bases[key]

    def _applied(self, tree: dict[str, Any], setting: Setting) -> dict[str, Any]:
        """The tree with one value set, sharing all else."""
        if setting.is_delete:
            raise _NeedsOmegaConf
        *parents, leaf = setting.key.split(".")
        value = setting.value
        if leaf == "type" and parents:
            holder = _plain(tree, parents)
            return tree if holder.get(leaf, value) == value else _with(tree, parents, {leaf: value})
        before = _plain(tree, parents).get(leaf)
        if isinstance(value, dict) and isinstance(before, dict) and "type" not in value:
            value = _over(before, value)
        tree = _with(tree, [*parents, leaf], value)
        if parents and value is not None:
            for other in self.alternatives(tuple(parents), leaf):
                tree = _with(tree, [*parents, other], None)
        return tree

    def _section(self, key: str, tree: Mapping[str, Any]) -> Any:
        """The value under a key of the tree, interpolations resolved and validated."""
        section, text = self.texts.get(id(tree[key]), (None, ""))
        if section is not tree[key]:
            section, text = tree[key], json.dumps(tree[key])
        if "???" in text:
            raise _NeedsOmegaConf
        if "${" in text:
            section = _resolved(section, tree)
            text = json.dumps(section)
        if (key, text) not in self.sections:
            self.sections[key, text] = self._validated(key, section)
        return self.sections[key, text]

    def _validated(self, key: str, section: Any) -> Any:
        """By both sets of rules that `_validate` asks for, of this section alone."""
        field = self.schema.model_fields.get(key)
        if field is None:
            raise _NeedsOmegaConf
        text = json.dumps(_over_defaults({key: section}, self.schema)[key])
        adapter = _adapter(self.schema, key)
        value = adapter.validate_python(json.loads(text))
        try:
            adapter.validate_json(text, strict=True)
        except pydantic.ValidationError as error:
            paths = [_locate((key, *problem["loc"]), self.schema)[0] for problem in error.errors(include_url=False)]
            if any(path == (key,) or _contains({key: section}, path) for path in paths):
                raise
        return value


@cache
def _adapter(schema: type[Config], key: str) -> Any:
    field = schema.model_fields[key]
    annotation: Any = Annotated[field.annotation, field]
    return pydantic.TypeAdapter(annotation)


def _plain(tree: Any, parents: Sequence[str]) -> dict[str, Any]:
    """The keys and values at a path; none where nothing is there yet."""
    for parent in parents:
        tree = tree.get(parent)
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise _NeedsOmegaConf
    return typing.cast("dict[str, Any]", tree)


def _with(tree: dict[str, Any] | None, path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with the value at this path; what lies elsewhere is shared."""
    first, *rest = path
    tree = tree or {}
    return tree | {first: _with(tree.get(first), rest, value) if rest else value}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return below | above | {key: _over(below[key], above[key]) for key in both}


_INTERPOLATION = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def _resolved(value: Any, tree: Mapping[str, Any]) -> Any:
    """The value with what its interpolations name in its place."""
    if isinstance(value, dict):
        return {key: _resolved(inner, tree) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, tree) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _INTERPOLATION.fullmatch(value)
    *parents, leaf = whole.group(1).split(".") if whole else [""]
    named = _plain(tree, parents).get(leaf)
    if named is None or isinstance(named, dict | list) or (isinstance(named, str) and "$" in named):
        raise _NeedsOmegaConf
    return named


def apply_overrides(config: C, overrides: Sequence[str]) -> C:
    """A complete value with `key=value` overrides applied, validated again. Config groups are not known here."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create(config.model_dump(mode="json"))
    for setting in _split_overrides(overrides, {})[1]:
        _apply(tree, setting, type(config))
    return _validate(_resolve(tree), type(config), lambda _: None)


def load_yaml(path: Path, schema: type[C]) -> C:
    """A file that `dump_yaml` wrote, validated."""
    try:
        tree = _read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return _validate(tree, schema, lambda _: path)


def dump_yaml(config: Config) -> str:
    """The complete value, defaults included; `load_yaml` reads it back to an equal one."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _search_folders(config_folder: Path | None) -> list[Path]:
    if config_folder is None:
        return [default_config_folder()]
    if not config_folder.is_dir():
        raise ConfigError(f"{config_folder}: no such folder of configs")
    own, packaged = config_folder.resolve(), default_config_folder()
    return [own] if own == packaged or not packaged.is_dir() else [own, packaged]


def _options(folders: Sequence[Path], group: str) -> list[str]:
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The options of each config group."""
    names = {str(sub.relative_to(folder)) for folder in folders for sub in folder.rglob("*") if sub.is_dir()}
    return {name: _options(folders, name) for name in sorted(names)}


def _split_overrides(
    overrides: Sequence[str | Setting],
    groups: Mapping[str, Sequence[str]],
    parse: Callable[[str], Override] | None = None,
) -> tuple[list[Override], list[Setting]]:
    """(choices of config groups, which are Hydra's to make; settings of values, variants first)."""
    parse = parse or _parse_override
    choices: list[Override] = []
    settings: list[Setting] = []
    for given in overrides:
        if isinstance(given, Setting) and not (given.key in groups and _names_option(given.value)):
            settings.append(given)
            continue
        override = parse(str(given))
        key = override.key_or_group
        value = None if override.is_delete() else override.value()
        if key in groups and _names_option(value):
            for option in value if isinstance(value, list) else [value]:
                if option is not None and option not in groups[key]:
                    known = did_you_mean(str(option), groups[key])
                    raise ConfigError(f"{key}: unknown option {option!r}. {known}")
            choices.append(override)
        elif "/" in key or override.package is not None:
            known = did_you_mean(key, groups)
            raise ConfigError(f"override {str(given)!r}: unknown config group {key!r}. {known}")
        else:
            settings.append(Setting(key, value, override.is_delete()))
    return choices, sorted(settings, key=lambda setting: not setting.key.endswith(".type"))


def _names_option(value: Any) -> bool:
    """Whether the value of a group's key chooses one of its files, rather than to set something."""
    return not isinstance(value, dict | int | float)


def _parse_override(text: str) -> Override:
    """An override in Hydra's grammar, which may not be Hydra's own setting nor a sweep."""
    from hydra.errors import HydraException

    try:
        override = _parser().parse_override(text)
    except HydraException as error:
        reasons = str(error).splitlines()[1:2]
        raise ConfigError(f"override {text!r}: expected key=value ({'; '.join(reasons)})") from None
    if override.is_sweep_override():
        raise ConfigError(f"override {text!r}: several values. Give one, quote the comma, or write a [list]")
    if override.key_or_group.split(".")[0] == "hydra":
        raise ConfigError(f"override {text!r}: Hydra's own settings have no effect here")
    return override


@cache
def _parser() -> OverridesParser:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


@dataclass(frozen=True)
class _ComposedFile:
    path: Path
    package: tuple[str, ...]  # where its content went in the tree


def _hydra_compose(
    name: str, choices: Sequence[Override], folders: Sequence[Path]
) -> tuple[DictConfig, Callable[[], list[_ComposedFile]]]:
    """The composed tree, and for errors the files that it came from, in the order in which they were merged."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, MissingConfigException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    arguments = {choice.get_key_element().lstrip("+~"): str(choice.input_line).lstrip("+") for choice in choices}
    try:
        with hydra.initialize_config_dir(str(folders[-1]), job_name="vlm", version_base=None):
            # Not `hydra.searchpath`: with it the config itself is not found in the folders that it adds.
            loader = typing.cast("ConfigLoaderImpl", GlobalHydra.instance().config_loader())
            for folder in reversed(folders[:-1]):
                loader.config_search_path.prepend("own", str(folder))
            loader.repository.initialize_sources(loader.config_search_path)
            while True:
                given = list(arguments.values())
                try:
                    composed = hydra.compose(name, given)
                    break
                except ConfigCompositionException as error:
                    # A group that the config's defaults list does not name is added to it.
                    unnamed = re.match(r"Could not override '([^']+)'", str(error))
                    key = unnamed.group(1) if unnamed else ""
                    if not arguments.get(key, "+").startswith(("+", "~")):
                        arguments[key] = "+" + arguments[key]
                        continue
                    raise
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        known = did_you_mean(option, _options(folders, group))
        raise ConfigError(f"config {name!r}: its defaults name {error.missing_cfg_file!r}, unknown. {known}") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(error)) from None
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(f"config {name!r}: {str(error).splitlines()[0]}") from None
    OmegaConf.set_struct(composed, False)

    @cache
    def files() -> list[_ComposedFile]:
        composed_files = []
        for default in loader.compute_defaults_list(name, given, RunMode.RUN).defaults:
            found = [folder / f"{default.config_path}.yaml" for folder in folders]
            found = [file for file in found if file.is_file()]
            if found:
                package = tuple(filter(None, (default.package or "").split(".")))
                composed_files.append(_ComposedFile(found[0], package))
        return composed_files

    return composed, files


def _apply(tree: DictConfig, setting: Setting, schema: type[Config]) -> None:
    """Set or delete one value in the composed tree."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key = setting.key
    parent, _, leaf = key.rpartition(".")
    try:
        if setting.is_delete:
            holder = OmegaConf.select(tree, parent) if parent else tree
            if not OmegaConf.is_dict(holder) or leaf not in holder:
                raise ConfigError(f"override {str(setting)!r}: no file sets {key}, so there is nothing to delete")
            del holder[leaf]
            return
        value = setting.value
        if leaf == "type" and parent and OmegaConf.select(tree, key, default=value) != value:
            OmegaConf.update(tree, parent, {"type": value}, merge=False, force_add=True)
        else:
            names_variant = isinstance(value, dict) and "type" in value
            OmegaConf.update(tree, key, value, merge=not names_variant, force_add=True)
        if parent and value is not None:
            for other in _alternatives(tuple(parent.split(".")), leaf, schema):
                OmegaConf.update(tree, f"{parent}.{other}", None, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"override {str(setting)!r}: {str(error).splitlines()[0]}") from None


def _alternatives(section: KeyPath, field: str, schema: type[Config]) -> list[str]:
    """The fields that an override of this one drops."""
    declared = [getattr(model, "alternatives", ()) for model in _models(_locate(section, schema)[1])]
    return [other for fields in declared if field in fields for other in fields if other != field]


def _resolve(composed: DictConfig) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: required, but not given") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{str(error).splitlines()[0]}") from None


def _source_file(path: KeyPath, files: Sequence[_ComposedFile], from_overrides: set[str]) -> Path | None:
    """The file that last set the value at this path; None if an override did or nobody."""
    dotted = _dotted(path)
    if any(f"{dotted}.".startswith(f"{key}.") for key in from_overrides):
        return None
    for file in reversed(files):
        if path[: len(file.package)] == file.package and _contains(_read_yaml(file.path), path[len(file.package) :]):
            return file.path
    return None


def _contains(tree: Any, path: KeyPath) -> bool:
    for key in path:
        known = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
        if key not in known:
            return False
        tree = tree[key]
    return bool(path)


class _Loader(yaml.SafeLoader):
    """Safe YAML as OmegaConf reads it: 1e-4 is a number, dates are text, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [child.value for child, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", mark)
        return super().construct_mapping(node, deep=deep)


_FLOAT = re.compile(r"^[-+]?((\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|nan))$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read_yaml(path: Path) -> Any:
    with path.open(encoding="utf-8") as file:
        try:
            tree = yaml.load(file, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(_yaml_problem(error, path)) from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a text file") from None
    return {} if tree is None else tree


def _yaml_problem(error: yaml.YAMLError, path: Path | None = None) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).splitlines()[0]
    file = _shown_path(Path(mark.name)) if mark else _shown_path(path) if path else "YAML"
    line = f", line {mark.line + 1}" if mark else ""
    return f"{file}{line}: not valid YAML ({problem})"


# --- Validate: a tree to a value, with errors of one line ------------------------------------------------------------


def _validate(tree: Any, schema: type[C], source: Callable[[KeyPath], Path | None]) -> C:
    """`source` tells which file set the value at a path."""
    if isinstance(tree, dict):
        tree = _over_defaults(tree, schema)
    text = json.dumps(tree, default=str)
    try:
        value = schema.model_validate(json.loads(text))
    except pydantic.ValidationError as error:
        problems = [(problem, *_locate(problem["loc"], schema)) for problem in error.errors(include_url=False)]
    else:
        # JSON's strict rules fit YAML: lists are tuples and text is a path, but '5' is no integer. They are asked only
        # about what was given, because pydantic holds Python defaults (a `Path`) to them as well.
        try:
            schema.model_validate_json(text, strict=True)
            return value
        except pydantic.ValidationError as error:
            problems = [(problem, *_locate(problem["loc"], schema)) for problem in error.errors(include_url=False)]
            problems = [problem for problem in problems if _contains(tree, problem[1])]
        if not problems:
            return value
    # A misspelt key is the cause of the missing one.
    problem, path, annotation = next((one for one in problems if one[0]["type"] == "extra_forbidden"), problems[0])
    line = _explain(typing.cast(Mapping[str, Any], problem), path, annotation, schema)
    file = source(path)
    raise ConfigError(f"{line} (in {_shown_path(file)})" if file else line)


def _over_defaults(tree: dict[str, Any], schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The tree with what pydantic would forget: a section given in part keeps the rest of the field's default value.

    Without this, `trainer: TrainerConfig = TrainerConfig(max_steps=9)` would lose the 9 as soon as another key of
    `trainer` is given, and `encoder.width=64` would have to repeat the default variant's `type`.
    """
    merged = dict(tree)
    for name, field in schema.model_fields.items():
        value = merged.get(name)
        if not isinstance(value, dict):
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        members = list(_models(field.annotation))
        chosen = next((member for member in members if _tag(member) == value.get("type")), None)
        if isinstance(default, pydantic.BaseModel) and ("type" not in value or chosen is type(default)):
            chosen = type(default)
            given = {key: getattr(default, key) for key in chosen.model_fields if key in default.model_fields_set}
            given = chosen.model_construct(**given).model_dump(mode="json", include=set(given), warnings=False)
            if _tag(chosen) is not None:
                given["type"] = _tag(chosen)
            value = _merge(given, value, chosen)
        elif len(members) == 1:
            chosen = members[0]
        if chosen is not None:
            merged[name] = _over_defaults(value, chosen)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any], schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    """`above` over `below`, section by section; a section of another variant replaces the one below it."""
    merged = below | above
    for key in below.keys() & above.keys() & schema.model_fields.keys():
        low, high = below[key], above[key]
        same = isinstance(low, dict) and isinstance(high, dict) and high.get("type", low.get("type")) == low.get("type")
        for member in _models(schema.model_fields[key].annotation):
            if same and _tag(member) == low.get("type"):
                merged[key] = _merge(low, high, member)
    return merged


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """The config classes that a field's annotation names directly: a class, or the members of a union."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _models(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _models(member)
    elif isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation


def _has_plain_member(annotation: Any) -> bool:
    """Whether a union has members that are no config classes, such as numbers."""
    if typing.get_origin(annotation) is Annotated:
        return _has_plain_member(typing.get_args(annotation)[0])
    members = typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else ()
    return any(member is not type(None) and not list(_models(member)) for member in members)


def _tag(model: type[pydantic.BaseModel]) -> str | None:
    """The value of `type` that chooses this variant."""
    field = model.model_fields.get("type")
    literals = typing.get_args(field.annotation) if field else ()
    return str(literals[0]) if literals else None


def _locate(location: tuple[str | int, ...], schema: type[pydantic.BaseModel]) -> tuple[KeyPath, Any]:
    """The path as the user writes it, and the annotation found there.

    pydantic's location also holds the tag of each union that it went through.
    """
    path: list[str | int] = []
    annotation: Any = schema
    for key in location:
        models = list(_models(annotation))
        if len(models) > 1:
            chosen = [model for model in models if key in (_tag(model), model.__name__)]
            if chosen:
                annotation = chosen[0]
                continue
        if models and key not in models[0].model_fields and _has_plain_member(annotation):
            if key != models[0].__name__:  # a label of pydantic's own
                break
            annotation = models[0]
            continue
        if models:
            if key not in models[0].model_fields:
                path.append(key)
                return tuple(path), models[0]
            annotation = models[0].model_fields[str(key)].annotation
            path.append(key)
            continue
        inner = _item(annotation, key)
        if inner is None:  # a label of pydantic's own, such as the branch of a union of plain types
            break
        annotation = inner
        path.append(key)
    return tuple(path), annotation


def _item(annotation: Any, key: str | int) -> Any:
    """The annotation of an entry of a list, tuple or dict; None if the annotation is none of these."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _item(arguments[0], key)
    if origin in (Union, types.UnionType):
        return next((found for member in arguments if (found := _item(member, key)) is not None), None)
    if origin is dict:
        return arguments[1]
    if origin is tuple and Ellipsis not in arguments:
        return arguments[key] if isinstance(key, int) and key < len(arguments) else None
    if origin in (list, tuple, set, frozenset, Sequence) and isinstance(key, int):
        return arguments[0]
    return None


_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys with values",
    "model": "keys with values",
    "none": "null",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _explain(problem: Mapping[str, Any], path: KeyPath, annotation: Any, schema: type[pydantic.BaseModel]) -> str:
    """One line for one of pydantic's errors."""
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    dotted, shown = _dotted(path), _shown(given)
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key. {_near_key(path, annotation, schema)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag for model in _models(annotation) if (tag := _tag(model)) is not None]
        where = _dotted((*path, "type"))
        if kind == "union_tag_not_found":
            return f"{where}: required, but not given. Available: {', '.join(tags)}"
        return f"{where}: unknown variant {context['tag']!r}. {did_you_mean(context['tag'], tags)}"
    if kind in ("literal_error", "enum"):
        values = re.findall(r"'([^']*)'", context["expected"]) if isinstance(given, str) else []
        return f"{dotted}: unknown value {shown}. " + (did_you_mean(str(given), values) or f"Use {context['expected']}")
    if kind == "missing":
        return f"{dotted}: required, but not given"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = context[bound]
        limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        return f"{dotted}: must be {words} {limit}, got {shown}"
    if kind in ("too_short", "too_long"):
        words = f"at least {context.get('min_length')}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{dotted}: needs {words} entries, got {context['actual_length']}"
    if kind in ("value_error", "assertion_error"):
        message = str(context.get("error") or problem["msg"])
        return f"{dotted}: {message}" if path else message
    expected = _EXPECTED.get(kind.split("_")[0])
    if expected is not None and re.search(r"_(type|parsing|from_float)$", kind):
        return f"{dotted or 'config'}: expected {expected}, got {shown}"
    message = problem["msg"].removeprefix("Input ")
    return f"{dotted or 'config'}: {message}, got {shown}"


def _near_key(path: KeyPath, model: Any, schema: type[pydantic.BaseModel]) -> str:
    """The near name among the key's neighbours, or else the place where the same name is a key."""
    *parent, key = path
    neighbours = list(model.model_fields) if hasattr(model, "model_fields") else []
    suggestion = did_you_mean(str(key), neighbours, lambda near: _dotted((*parent, near)))
    if not suggestion.startswith("Did"):
        places = [_dotted(place) for place in _all_keys(schema) if place[-1] == key]
        suggestion = f"Did you mean {places[0]}? {suggestion}" if places else suggestion
    return suggestion


def _all_keys(schema: type[pydantic.BaseModel]) -> Iterator[KeyPath]:
    for name, field in schema.model_fields.items():
        yield (name,)
        for member in _models(field.annotation):
            yield from ((name, *inner) for inner in _all_keys(member))


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(key) for key in path)


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown_path(path: Path) -> str:
    """Relative to the current folder if it lies inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# --- Fingerprint: a value to its name --------------------------------------------------------------------------------


_ENDS_IN_FINGERPRINT = re.compile(r"-[0-9a-f]{12}$")


def fingerprint(config: Config) -> str:
    """12 hex digits of the SHA-256 of what decides the run's numbers.

    Left out: fields declared with `not_identity`, and fields that equal their default, so that a field added later
    changes no old fingerprint. `type` and `always_identity` count always. The price: a default that changes must raise
    `FINGERPRINT_FORMAT`. Of a `RunReference` that ends in a fingerprint only the final name counts, so that the runs
    folder can move; any other path counts whole.
    """
    return Fingerprints().of(config)


class Fingerprints:
    """The fingerprints of many configs that share sections: each object is read once, and kept alive for that."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[pydantic.BaseModel, Any]] = {}  # by `id`

    def of(self, config: Config) -> str:
        content = {"format": FINGERPRINT_FORMAT, "config": self._fields(config)}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _fields(self, config: pydantic.BaseModel) -> dict[str, Any]:
        """What counts of a config, as JSON."""
        counted = {}
        for name, is_reference, default in _counted_fields(type(config)):
            own = self._identity(getattr(config, name), is_reference)
            if default is None or json.dumps(own, sort_keys=True) != default:
                counted[name] = own
        return counted

    def _identity(self, value: Any, is_reference: bool = False) -> Any:
        """What counts of a value, as JSON."""
        if isinstance(value, pydantic.BaseModel):
            if id(value) not in self.known:
                self.known[id(value)] = value, self._fields(value)
            return self.known[id(value)][1]
        if isinstance(value, Mapping):
            return {str(key): self._identity(inner, is_reference) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._identity(inner, is_reference) for inner in value]
        if isinstance(value, set | frozenset):
            return sorted((self._identity(inner, is_reference) for inner in value), key=str)
        if isinstance(value, Path):
            return value.name if is_reference and _ENDS_IN_FINGERPRINT.search(value.name) else value.as_posix()
        if value is None or isinstance(value, str | int | float | bool):
            return value
        return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


@cache
def _counted_fields(model: type[pydantic.BaseModel]) -> list[tuple[str, bool, str | None]]:
    """(name, whether it refers to a run, text of the default that does not count) of each field that is identity."""
    fields = []
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        is_reference = _is_reference(field.annotation) or any(isinstance(m, _ReferenceMarker) for m in field.metadata)
        default = None
        always = name == "type" or (isinstance(extra, dict) and extra.get("identity") == "always")
        if not always and not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data={})
            default = json.dumps(Fingerprints()._identity(value, is_reference), sort_keys=True)
        fields.append((name, is_reference, default))
    return fields


def _is_reference(annotation: Any) -> bool:
    marked = isinstance(annotation, _ReferenceMarker)
    return marked or any(_is_reference(inner) for inner in typing.get_args(annotation))
