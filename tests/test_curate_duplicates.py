"""Duplicates: MinHash against its S-curve, first-stays against brute force, and the phases as the pipeline runs them."""
import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from curate_texts import SHARED, statutes

from megatron_ext.curate.blocks import Shards
from megatron_ext.curate.quality import clusters, keep_first
from megatron_ext.curate.quality.block import ExactDuplicates, NearDuplicates, ParagraphDuplicates
from megatron_ext.curate.quality.config import DuplicatesConfig, QualityConfig
from megatron_ext.curate.quality.duplicates import MinHash, collision, duplicates, exact_key, jaccard, paragraph_keys, without
from megatron_ext.curate.quality.hashing import windows, windows_of
from megatron_ext.curate.quality.text import paragraphs, solid

SIMILARITIES = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)


def sets(similarity: float, size: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of shingles of `size` together, `similarity` of them in both."""
    every = draw.integers(0, 2**63, size, dtype=np.uint64)
    both = round(similarity * size)
    half = both + (size - both) // 2
    return np.unique(every[:half]), np.unique(np.concatenate([every[:both], every[half:]]))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_share_of_found_pairs_is_on_the_s_curve(similarity):
    minhash, draw, trials = MinHash(), np.random.default_rng(int(similarity * 100)), 400
    found = sum(duplicates(*map(minhash.signature, sets(similarity, 400, draw))) for _ in range(trials))
    expected = collision(similarity, buckets=14, hashes=8)
    deviation = max((expected * (1 - expected) / trials) ** 0.5, 1 / trials)
    assert abs(found / trials - expected) < 4 * deviation, (found / trials, expected)


def test_each_hash_agrees_with_the_similarity_and_is_its_own():
    """The share of equal minima is the Jaccard similarity, for every hash function alone, and no two functions agree more than chance."""
    minhash, draw = MinHash(), np.random.default_rng(0)
    equal = np.stack([np.equal(*(minhash.signature(one).ravel() for one in sets(0.5, 200, draw))) for _ in range(600)])
    assert abs(equal.mean() - 0.5) < 4 * 0.5 / (600 * 112) ** 0.5
    assert np.abs(equal.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / 600**0.5
    correlation = np.corrcoef(equal.T)
    assert np.abs(correlation[~np.eye(112, dtype=bool)]).max() < 5.5 / 600**0.5


def test_windows_hash_what_they_hold():
    draw = np.random.default_rng(0)
    symbols = draw.integers(0, 50, 500)
    for size in (1, 2, 7):
        found = windows(symbols, size)
        by_content = defaultdict(set)
        for at, value in enumerate(found.tolist()):
            by_content[tuple(symbols[at : at + size].tolist())].add(value)
        assert all(len(values) == 1 for values in by_content.values())
        assert len({value for values in by_content.values() for value in values}) == len(by_content)
    together = windows_of(symbols, (1, 2, 7, 600))
    assert all(np.array_equal(together[size], windows(symbols, size)) for size in (1, 2, 7)) and not len(together[600])


def test_spelling_that_does_not_count():
    text = "제1조(목적) 이 법은 교육을 정한다."
    assert exact_key(text) == exact_key("제１조 (목 적)\n이 법은\n교육을   정한다") != exact_key(text.replace("정", "청"))
    assert exact_key("---") != exact_key("***")
    same = MinHash()
    assert jaccard(same.shingles(text), same.shingles("제1조(목 적)이법은 교육을 정한다")) == 1
    assert not len(same.shingles("--- !")) and len(same.shingles("가나다")) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_first_place_stays(seed, tmp_path):
    draw = random.Random(seed)
    shards, parts = draw.randint(1, 5), draw.choice((1, 2, 7))
    sizes, edges = [draw.randint(0, 40) for _ in range(shards)], (0, 1, 2**63, 2**64 - 1)
    entries = [[(draw.choice((*edges, draw.randrange(2**64))), place // 3, place % 3) for place in range(size)] for size in sizes]
    for shard in draw.sample(range(shards), shards):
        keep_first.collect(iter(entries[shard]), tmp_path, shard)
    for part in draw.sample(range(parts), parts):
        keep_first.resolve(tmp_path, part, parts, shards)
    first, expected, firsts = {}, [defaultdict(set) for _ in range(shards)], [defaultdict(set) for _ in range(shards)]
    for shard, own in enumerate(entries):
        for key, place, part in own:
            if key in first:
                expected[shard][place].add(part)
                if first[key] != (shard, place):
                    firsts[shard][place].add(first[key])
            first.setdefault(key, (shard, place))
    found = [keep_first.removals(tmp_path, shard, parts) for shard in range(shards)]
    assert [gone for gone, _ in found] == expected
    assert [of for _, of in found] == [{place: sorted(where) for place, where in of.items()} for of in firsts]


@pytest.mark.parametrize("seed", range(5))
def test_of_each_cluster_the_first_stays(seed, tmp_path):
    draw = random.Random(seed)
    nodes = [(shard, place) for shard in range(3) for place in range(20)]
    pairs = [(*draw.choice(nodes), *draw.choice(nodes)) for _ in range(40)]
    pairs += [(2, at, 2, at + 1) for at in range(19, 30)]  # a long chain
    (tmp_path / "pairs").mkdir()
    for number in range(4):
        np.asarray(pairs[number::4], dtype="<u4").tofile(tmp_path / "pairs" / f"{number}.dups")
    clusters.resolve(tmp_path)
    around = defaultdict(set)
    for a, b, c, d in pairs:
        around[a, b].add((c, d)), around[c, d].add((a, b))
    expected: dict[int, dict] = defaultdict(dict)
    for node in around:
        seen, waiting = {node}, [node]
        while waiting:
            new = around[waiting.pop()] - seen
            seen |= new
            waiting += new
        if node != min(seen):
            expected[node[0]][node[1]] = [min(seen)]
    assert {shard: clusters.firsts(tmp_path, shard) for shard in expected} == expected


def test_removing_paragraphs_leaves_the_others_as_they_are():
    text = "\n제목\n\n첫째 문단\n둘째 줄 \n\n\n셋째\n\n끝"
    assert paragraphs(text) == ["제목", "첫째 문단\n둘째 줄", "셋째", "끝"]
    assert without(text, {1}) == "제목 \n\n\n셋째\n\n끝"
    assert without(text, {0, 3}).split() == ["첫째", "문단", "둘째", "줄", "셋째"]
    assert without(text, {0, 1, 2, 3}) == "" and without(text, set()).split() == text.split()
    assert paragraph_keys("짧다\n\n" + "가" * 40 + "\n\n" + "가 " * 40, least=40)[0] is None
    assert len(set(paragraph_keys("가" * 40 + "\n\n" + "가 " * 40, least=40))) == 1


@dataclass
class Page:
    text: str
    id: str = ""
    metadata: dict = field(default_factory=dict)


def run(block, texts: list[list[str]], work) -> list[list[str]]:
    """Runs the phases of a step as the pipeline would, over shards that are lists, and gives the texts that stay."""
    from datatrove.data import Document

    shards = Shards(folder=work, count=len(texts), reader=lambda: None, work=work)
    for phase in block.phases(shards):
        for rank in range(phase.tasks):
            *reading, step = phase.steps()
            data = (Document(text=text, id=str(number)) for number, text in enumerate(texts[rank])) if reading else None
            list(step.run(data, rank, phase.tasks) or ())
    kept = []
    for rank, own in enumerate(texts):
        deciding, pages = block.decide(shards, rank), [Page(text) for text in own]
        kept.append([page.text for page in pages if deciding.process(page).action != "drop"])
    return kept


def edited(text: str, share: float, draw: random.Random) -> str:
    """Some words changed: another word of the text, an ending gone, a space gone or one more."""
    words = text.split(" ")
    for at in draw.sample(range(len(words)), round(share * len(words))):
        kind, word = draw.randrange(4), words[at]
        words[at] = (draw.choice(words), word[:-1], word + "\u200bX", f"{word[:1]} {word[1:]}")[kind] if word else word
    return " ".join(words)


WORDS = [f"{a}{b}{c}" for a in "국민법산강들집길" for b in "가나다라마바사" for c in ("은", "는", "을", "에서", "으로", "이다")]


def article(draw: random.Random, size: int = 150) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(size))


def test_steps_over_shards(tmp_path):
    """Exact, near and paragraph duplicates in three shards: exactly these go, the first of each stays, a second run changes nothing."""
    pytest.importorskip("datatrove")
    draw = random.Random(0)
    shards = [[article(draw) for _ in range(12)] for _ in range(3)]
    settings = QualityConfig(duplicates=DuplicatesConfig(parts=3))
    copies = {(1, 0): shards[0][0].replace(" ", "\n"), (2, 5): shards[0][0] + ".", (2, 6): shards[2][0], (0, 7): shards[0][1].upper()}
    with_copies = [[copies.get((shard, place), text) for place, text in enumerate(own)] for shard, own in enumerate(shards)]
    expected = [[text for place, text in enumerate(own) if (shard, place) not in copies] for shard, own in enumerate(with_copies)]
    assert run(ExactDuplicates(settings), with_copies, tmp_path / "exact") == expected
    near = {(1, 1): edited(shards[0][2], 0.01, draw), (2, 1): edited(shards[0][2], 0.01, draw), (2, 2): edited(shards[1][3], 0.01, draw)}
    with_near = [[near.get((shard, place), text) for place, text in enumerate(own)] for shard, own in enumerate(shards)]
    expected = [[text for place, text in enumerate(own) if (shard, place) not in near] for shard, own in enumerate(with_near)]
    for _ in range(2):
        assert run(NearDuplicates(settings), with_near, tmp_path / "near") == expected
    shared = article(draw, 30)
    with_shared = [[f"{own[0]}\n\n{shared}\n\n{own[1]}", f"{shared}", *own[2:], ""] for own in shards]
    expected = [[f"{own[0]}\n\n{shared if not shard else ''}\n\n{own[1]}", *own[2:], ""] for shard, own in enumerate(shards)]
    found = run(ParagraphDuplicates(settings), with_shared, tmp_path / "paragraphs")
    assert [[text.split() for text in own] for own in found] == [[text.split() for text in own] for own in expected]


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_edited_bills_are_found_and_different_bills_are_not():
    """Each bill against itself with 1 % of its words changed, and against all others: four of the ten were moved together with one reason."""
    minhash, draw = MinHash(), random.Random(0)
    texts = list(statutes().values())
    sets = [minhash.shingles(text) for text in texts]
    signatures = [minhash.signature(one) for one in sets]
    for at, (text, own) in enumerate(zip(texts, signatures)):
        assert all(duplicates(own, minhash.signature(minhash.shingles(edited(text, 0.01, draw)))) for _ in range(5))
        letters = solid(text)
        broken = "\n\n".join(letters[place : place + 40] for place in range(0, len(letters), 40))
        assert np.array_equal(own, minhash.signature(minhash.shingles(broken)))
        for other in range(at):
            similar = jaccard(sets[at], sets[other])
            assert similar > 0.4 or not duplicates(own, signatures[other]), similar
