"""The embedded tasks: what the library's source says by `ast`, each answer true to it, disjoint stages, rankings of what they claim, files that appear whole."""
import collections
import importlib
import inspect
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_ext.config.schema import ChatConfig, DataConfig
from megatron_ext.data.definitions import doc_documents, stdlib_modules
from megatron_ext.errors import UserError
from rlhf.data import stdlib_files, stdlib_tasks
from rlhf.data.records import KINDS, read
from rlhf.data.stdlib_files import FILE, ensure
from rlhf.data.stdlib_tasks import LONGEST_ANSWER, LONGEST_PROMPT, SHORTEST, Task, cut_off, first_sentences, shuffled, stems

ROOT = Path(__file__).resolve().parents[1]

SHAPES = '''"""Shapes of the plane."""
raise SystemExit("a library that is read is never run")
try:
    import nothing
except ImportError:
    def area(width: int, height: "int" = 2, *, unit=None) -> int:
        """Return the area of a rectangle."""
        # comments of the body stay
        return width * height if unit is None else unit(width * height)

class Circle(Shape, metaclass=Meta):
    """A round figure around one point.

    It has a radius.
    """

    @property
    async def radius(self):
        """Distance of the border\\f from the point in the middle."""
        text = """
two lines of a string"""
        return await self._radius(text)

    def undocumented(self):
        return 1
\f
def empty():
    """   """

def one(): """Nothing is behind this documentation."""
'''


@pytest.fixture(scope="module")
def questions() -> list[Task]:
    return stdlib_tasks.tasks()


@pytest.fixture(scope="module")
def rankings(questions) -> list[dict]:
    return list(stdlib_tasks.rankings(questions))


@pytest.fixture
def library(tmp_path) -> Path:
    """A small library: its modules describe their functions alike, in words of their own."""
    root = tmp_path / "library"
    (root / "package").mkdir(parents=True)
    (root / "shapes.py").write_text(SHAPES, encoding="utf-8")
    (root / "package" / "__init__.py").write_text('"""A package."""\n', encoding="utf-8")
    (root / "posixpath.py").write_text('def join(a, *p):\n    """Join two or more pathname components."""\n', encoding="utf-8")
    (root / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    for word in ("alpha", "bravo", "carrot", "delta", "echoes", "foxtrot", "golfers", "hotel"):
        functions = [f'def {word}_{n}(x):\n    """Return {word} number {n} of all that {word} has."""\n' for n in range(12)]
        (root / f"{word}.py").write_text("\n".join(functions), encoding="utf-8")
    return root


def test_definitions_are_read_as_written_and_nothing_runs(library):
    modules = {module.name: module for module in stdlib_modules(library)}
    assert "broken" not in modules and "latin" not in modules
    assert modules["package"].documentation == "A package." and not modules["package"].definitions
    shapes = modules["shapes"]
    assert shapes.documentation == "Shapes of the plane."
    assert [found.name for found in shapes.definitions] == ["shapes.area", "shapes.Circle", "shapes.Circle.radius", "shapes.one"]
    area, circle, radius, one = shapes.definitions
    assert area.header == "def area(width, height=2, *, unit=None):" and area.call == "shapes.area(width, height=2, *, unit=None)"
    assert area.body == "# comments of the body stay\nreturn width * height if unit is None else unit(width * height)"
    assert circle.is_class and circle.header == "class Circle(Shape):" and circle.call == "shapes.Circle" and circle.body == ""
    assert circle.documentation == "A round figure around one point.\n\nIt has a radius."
    assert radius.header == "async def radius(self):" and radius.body.endswith("return await self._radius(text)")
    assert one.body == ""
    assert modules["os.path"].definitions[0].name == "os.path.join"


def test_the_documentation_corpus(library):
    documents = list(doc_documents(library))
    assert "os.path.join(a, *p)\nJoin two or more pathname components.\n" in documents
    assert "shapes\nShapes of the plane.\n\nshapes.area(width, height=2, *, unit=None)\nReturn the area of a rectangle.\n\n" in next(
        text for text in documents if text.startswith("shapes"))
    taken = []
    assert list(doc_documents(library, read=taken.append)) == documents and sum(taken) == sum(file.stat().st_size for file in library.rglob("*.py"))


@pytest.mark.parametrize(("documentation", "answer"), [
    ("Return the area\n    of it, in m^2.\n\nMore.", "Return the area of it, in m^2."),
    ("A headline without its full stop", "A headline without its full stop."),
    ("First of two sentences. " + "Second one is far too long to fit, " * 8 + "it is.", None),
    ("First of the two sentences here. " + "Second one is far too long to fit, " * 8 + "it is.", "First of the two sentences here."),
    ("First of the two sentences (e.g. this one here). Second is taken too!", "First of the two sentences (e.g. this one here). Second is taken too!"),
    ("Too short, this.", None),
    ("join(a, b) -> joins two strings of text", None),
    (">>> join(1, 2) and what it prints here", None),
    ("Returns a date string as it is specified, e.g.:", None),
    ("other & self is what this does.", None),
    ("", None),
])
def test_first_sentences(documentation, answer):
    assert first_sentences(documentation) == answer


def test_there_are_enough_and_they_fit(questions):
    kinds = collections.Counter(task.kind for task in questions)
    assert 3000 <= len(questions) <= 8000 and kinds["describe"] > 2000 and kinds["complete"] > 500
    for task in questions:
        assert len(task.prompt) <= LONGEST_PROMPT and len(task.answer) <= LONGEST_ANSWER and len(task.answer.split()) >= SHORTEST
        assert task.answer == task.answer.strip() and (task.kind == "complete" or (task.answer[-1] in ".!?" and "\n" not in task.answer))
    assert len({task.prompt for task in questions}) == len({task.answer for task in questions}) == len(questions)


def test_answers_are_those_of_the_running_library(questions):
    """Against `inspect`, which reads the objects and not the source, on modules that are safe to import."""
    checked = collections.Counter()
    for task in questions:
        module = next((name for name in ("os.path", "collections", "textwrap", "argparse", "json.decoder", "copy") if task.name.startswith(name + ".")), None)
        found: object = module and importlib.import_module(module)
        for part in task.name.removeprefix(f"{module}.").split(".") if module else ():
            found = inspect.getattr_static(found, part, None)
        found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
        if not inspect.isfunction(found) or not Path(found.__code__.co_filename).is_file():  # C took its place, or `exec` made it
            continue
        if task.kind == "describe":
            told = " ".join(inspect.getdoc(found).split())
            assert told.startswith(task.answer.rstrip(".")), task.name
        else:
            squeezed = "".join(inspect.getsource(found).split())
            assert squeezed.endswith("".join(task.answer.split())), task.name
            assert f"def {found.__name__}(" in task.prompt
        checked[task.kind] += 1
    assert checked["describe"] >= 30 and checked["complete"] >= 8, checked


def test_stages_share_no_prompt_and_no_answer(questions, rankings):
    sft, prompts = list(stdlib_tasks.conversations(questions)), list(stdlib_tasks.prompts(questions))
    of = [{record["prompt"] for record in records} for records in (sft, rankings, prompts)]
    assert sum(map(len, of)) == len(set.union(*of))
    true = [{record["response"] for record in sft}, {record["responses"][record["demonstration"]] for record in rankings},
            {record["reference"] for record in prompts}]
    assert sum(map(len, true)) == len(set.union(*true))
    for records, share in zip((sft, rankings, prompts), stdlib_tasks.SHARES.values(), strict=True):
        assert abs(len(records) / len(questions) - share) < 0.03


def places_of(record: dict, answers: dict[str, Task]) -> dict[str, int]:
    """Which response is which, found from the texts alone."""
    true = record["responses"][record["demonstration"]]
    found = {}
    for place, text in enumerate(record["responses"]):
        if text == true:
            kind = "true"
        elif text in answers:
            kind = "other"
        else:
            kind = "shuffled" if sorted(text.split()) == sorted(true.split()) else "cut"
        found[kind] = place
    return found


def test_rankings_are_what_they_claim(questions, rankings):
    by_prompt, by_answer = {task.prompt: task for task in questions}, {task.answer: task for task in questions}
    first_places, other_uses = collections.Counter(), collections.Counter()
    for record in rankings:
        task, place = by_prompt[record["prompt"]], places_of(record, by_answer)
        assert sorted(place) == ["cut", "other", "shuffled", "true"], record
        assert record["ranking"] == [place["true"], sorted((place["cut"], place["other"])), place["shuffled"]]
        true, cut, other, mixed = (record["responses"][place[kind]] for kind in ("true", "cut", "other", "shuffled"))
        assert true == task.answer and true.startswith(cut) and 0.25 < len(cut) / len(true) < 0.71
        assert by_answer[other].module != task.module and by_answer[other].kind == task.kind and not stems(other) & stems(task.prompt)
        assert mixed.split() != true.split()
        first_places[place["true"]] += 1
        other_uses[other] += 1
    assert len(rankings) > 1000
    assert min(first_places[place] for place in range(4)) > len(rankings) / 5  # where it stands tells nothing
    assert sum(count == 1 for count in other_uses.values()) > 0.8 * len(rankings)  # an answer alone tells nothing


def test_cut_code_is_no_code_and_a_cut_sentence_has_no_end(rankings, questions):
    by_prompt, by_answer = {task.prompt: task for task in questions}, {task.answer: task for task in questions}
    seen = collections.Counter()
    for record in rankings:
        cut = record["responses"][places_of(record, by_answer)["cut"]]
        kind = by_prompt[record["prompt"]].kind
        seen[kind] += 1
        if kind == "describe":
            assert cut[-1] not in ".!?,;:"
        else:
            with pytest.raises(SyntaxError):
                compile("async def f():\n" + "".join(f"    {line}\n" for line in cut.split("\n")), "", "exec")
    assert len(seen) == 2
    assert cut_off(Task("complete", "a.b", "?", "a\nb\nc\nd\ne")) is None  # wherever it is cut, what is left is whole


def test_shuffling_separates_neighbours():
    task = Task("describe", "a.b", "?", "one two three four five six seven")
    words = shuffled(task).split()
    kept = set(pairwise(task.answer.split())) & set(pairwise(words))
    assert sorted(words) == sorted(task.answer.split()) and len(kept) <= 1 and shuffled(task) == " ".join(words)


def test_small_library(library):
    """No question twice, none of what cannot be asked, the rest as it stands there."""
    found = {task.name: task for task in stdlib_tasks.tasks(library)}
    assert found["shapes.Circle.radius"].answer == "Distance of the border from the point in the middle."  # whitespace is one blank
    assert found["os.path.join"].answer == "Join two or more pathname components." and "os.path.join" in found["os.path.join"].prompt
    area = found["shapes.area"]
    assert (area.kind, area.answer) in {("describe", "Return the area of a rectangle."), ("complete", area.answer)}
    assert "shapes.empty" not in found and not any(name.startswith("broken") for name in found)
    (library / "zulu.py").write_text((library / "alpha.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert {task.name for task in stdlib_tasks.tasks(library)} == set(found)  # the same answers again under other names


# ---- files ---------------------------------------------------------------------------------------------------------------------------

ENSURE = "import sys; from rlhf.data.stdlib_files import *; print(ensure(DataConfig(cache=sys.argv[1]), Path(sys.argv[2]))['sft'])"


def test_files_are_made_once_and_read_by_every_stage(library, tmp_path):
    """Several processes at once, with other hash seeds: one directory, the same bytes as in another cache, read without a bad record."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", ENSURE, str(tmp_path / "cache"), str(library)], stdout=subprocess.PIPE, text=True,
                                env=environment | {"PYTHONHASHSEED": str(seed)}) for seed in range(3)]
    said = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0] and len(said) == 1
    directory = Path(said.pop()).parent
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]  # nothing temporary is left
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
    stages = ensure(DataConfig(cache=str(tmp_path / "cache")), library)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()} == before
    again = ensure(DataConfig(cache=str(tmp_path / "another")), library)["sft"].parent
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {name: content for name, (_, content) in before.items()}
    manifest = json.loads((directory / FILE).read_text(encoding="utf-8"))
    assert set(stages) == set(KINDS)
    for stage, path in stages.items():
        records, bad = read(path, ChatConfig(), KINDS[stage])
        assert bad.count == 0 and len(records) == manifest["files"][path.name]["records"] > 5
    first = json.loads(stages["reward"].read_text(encoding="utf-8").splitlines()[0])
    ranking = read(stages["reward"], ChatConfig(), KINDS["reward"])[0][0]
    assert [sorted(ranking.ranks), ranking.demonstrations] == [[0, 1, 1, 2], (first["demonstration"],)]
    assert ranking.ranks[first["demonstration"]] == 0


def test_another_library_another_directory(library, tmp_path):
    data = DataConfig(cache=str(tmp_path / "cache"))
    before = ensure(data, library)["sft"]
    (library / "alpha.py").write_text('def f(x):\n    """Return quite another thing than before."""\n', encoding="utf-8")
    assert ensure(data, library)["sft"].parent != before.parent and before.exists()


def test_damage_and_a_cache_that_cannot_be_written(library, tmp_path):
    data = DataConfig(cache=str(tmp_path / "cache"))
    path = ensure(data, library)["sft"]
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(UserError, match="sft.jsonl changed"):
        ensure(data, library)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ensure(data, library)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ensure(DataConfig(cache=str(tmp_path / "file" / "cache")), library)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("mine")
    with pytest.raises(UserError, match="does not hold"):
        stdlib_files.write(taken, library)
    assert (taken / "note").read_text() == "mine"
