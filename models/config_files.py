"""Finds the files that YAMLs and flags name, and reads YAML strictly."""

from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST = 255  # characters of a name, which is as far as all file systems go in one part of a path
DEEPEST = 100  # brackets within each other in a YAML
MOST_NODES = 100_000  # values that a YAML may hold, those behind aliases counted at each


def places(name: str | Path, yaml_path: Path) -> list[Path]:
    """Where a path in a YAML may lead: beside it, the working directory, the repository.

    The predecessor's scripts ran one folder below its root: its "../configs/x.yaml" is this
    repository's configs/x.yaml, wherever the YAML lies.
    """
    bases = [yaml_path.parent, Path.cwd(), REPOSITORY]
    inside = Path(name).relative_to("..") if Path(name).is_relative_to("..") else name
    return [*(base / name for base in bases), REPOSITORY / inside]


def find_file(name: str | Path, yaml_path: Path, key: str, folder: bool = False) -> Path:
    """The first of `places` that exists, absolute; a link as the last part keeps its own name.

    Args:
        folder: a folder will do.

    Raises:
        FileNotFoundError: in none of them; the message lists them.
        ValueError: a folder where a file is meant, or no file can have such a name.
    """
    if not str(name) or "\0" in str(name) or len(str(name)) > LONGEST:
        raise ValueError(f"{yaml_path}: {key}: {str(name)[:80]!r} cannot be the name of a file")
    candidates = list(dict.fromkeys(places(name, yaml_path)))
    for place in candidates:
        if place.is_dir() and not folder:
            raise ValueError(f"{yaml_path}: {key}: {place} is a folder; name the file in it")
        if place.exists():
            return place.parent.resolve() / place.name
    begun = [p.with_name(p.name + ".part") for p in candidates if p.name not in ("", "..")]
    begun = [p for p in begun if p.exists()]
    hint = f"; {begun[0]} is a download that has not ended" if begun else ""
    tried = ", ".join(str(p) for p in candidates)
    raise FileNotFoundError(f"{yaml_path}: {key}: {str(name)!r} was found at none of {tried}{hint}")


def flag_path(flag: str, value: str) -> Path:
    """The file or folder that `flag value` names from the working directory, absolute.

    Raises:
        FileNotFoundError: nothing is there; names the flag.
    """
    path = Path(value)
    if not path.exists():
        raise FileNotFoundError(f"{flag} {value}: no such file")
    return path.parent.resolve() / path.name


def shown(path: Path) -> str:
    """An absolute path as logs show it: from the working directory where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_yaml(path: Path) -> dict:
    """A YAML file's mapping, with duplicate keys refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line that names file, line and problem.
    """
    if path.is_dir():
        raise ValueError(f"config {path}: is a folder; name the YAML file in it")
    if not path.is_file():
        raise FileNotFoundError(f"config {path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        advice = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise ValueError(f"config {path}{line}: not valid YAML: {error.problem}{advice}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters, or dates that do not exist
        reason = " ".join(str(error).split())
        raise ValueError(f"config {path}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise ValueError(f"config {path}: not valid YAML: nested too deep") from error
    if content is None:
        raise ValueError(f"config {path}: is empty")
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: holds {type(content).__name__}, needs a mapping of keys")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; a graft plan must not."""

    def fetch_flow_collection_start(self, kind):
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deep", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(kind)

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"  # "<<", which has no value of its own
                name = key.value if merge else self.construct_object(key)
                if name in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {name!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(name)
        return node


def _count(node: yaml.Node, counted: dict[yaml.Node, int | None]) -> int:
    """Values that a node stands for: with aliases, a few lines can mean more than memory holds."""
    if node in counted:
        if counted[node] is None:
            raise yaml.MarkedYAMLError(problem="holds itself", problem_mark=node.start_mark)
        return counted[node]
    counted[node] = None
    number = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for child in item if isinstance(item, tuple) else (item,):
                number += _count(child, counted)
    if number > MOST_NODES:
        problem = f"aliases multiply to more than {MOST_NODES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counted[node] = number
    return number


def check_keys(path: Path, where: str, found: dict, legal: dict, required: tuple = ()) -> None:
    """Raises ValueError for a key that is not legal, of the wrong type, or missing.

    Args:
        path, where: the file and the place in it, for the message.
        legal: key -> type, or tuple of types; a boolean is no int here.
    """
    for key, value in found.items():
        if key not in legal:
            raise ValueError(
                f"{path}: {where}: unknown key {key!r}; legal keys: {', '.join(sorted(legal))}"
            )
        types = legal[key] if isinstance(legal[key], tuple) else (legal[key],)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            words = {type(None): "null", dict: "mapping", str: "text"}
            names = " or ".join(words.get(t, t.__name__) for t in types)
            raise ValueError(f"{path}: {where}: {key}: {value!r} must be of type {names}")
    for key in required:
        if key not in found:
            raise ValueError(f"{path}: {where}: key {key!r} is missing")
