"""From a source to a reward model: built, answered by a checkpoint of our own, ordered, exported, trained on."""
import json
from functools import partial

import pytest
from collecting import collect as command
from collecting import config, read, write
from rlhf_small import NOUNS, VERBS, run
from small import records

from rlhf.collect import ballots, tasks
from rlhf.collect.desk import Desk
from rlhf.collect.log import AppendLog

collect = partial(command, fork=True)
ANSWER = ("collect.template=answer", "generate.samples=3", "generate.max_tokens=12", "generate.batch_size=8", "launch.device=cpu", "collect.keep_cut=true")


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A directory with sft.jsonl: 24 questions with answers."""
    folder = tmp_path_factory.mktemp("collected")
    source = write(folder / "source.jsonl", [{"prompt": f"What does {verb}_{noun} do?", "response": f"It will {verb} the {noun}.", "domain": noun, "id": f"{verb}_{noun}"}
                                             for verb in VERBS[:6] for noun in NOUNS[:4]])
    collect("build", f"input={source}", f"output={folder / 'built'}")
    return folder


def test_from_a_source_to_a_reward_model(collected, rlhf_chain):
    load = f"checkpoint.load={rlhf_chain['pretrain']}"
    words = (f"input={collected / 'built'}", load, *ANSWER)
    # In two goes, the first stopped by its budget, the second on two ranks; and in one, with another batch: the same bytes.
    done = collect("augment", *words, f"output={collected / 'built' / 'own'}", "collect.max_requests=30", code=1)
    assert "error: collect.max_requests=30 is spent" in done.stderr and "Traceback" not in done.stderr
    collect("augment", *words, f"output={collected / 'built' / 'own'}", "collect.max_requests=100", "parallel.tp=2")
    collect("augment", *(word for word in words if "batch_size" not in word), f"output={collected / 'whole'}", "generate.batch_size=3")
    rows = read(collected / "built" / "own" / "answers.jsonl")
    assert (collected / "whole" / "answers.jsonl").read_bytes() == (collected / "built" / "own" / "answers.jsonl").read_bytes()
    assert len(rows) > 24 and rows[0]["model"].startswith("pretrain/step_") and rows[0]["source"]["id"] == "open_file" and rows[0]["domain"] == "file"

    collect("build", f"input={collected / 'built'}", f"output={collected / 'tasks'}", "collect.builder=tasks")
    found = tasks.load(collected / "tasks" / "tasks.jsonl")
    assert len(found) == 24 and all(any(answer.origin == "demonstration" for answer in one.answers) for one in found.values())
    with AppendLog(collected / "tasks" / ballots.FILE, key="x") as log:  # people, who like the source's answer best and short ones next
        desk = Desk(found, log, config("collect.shared=0").collect)
        while (one := desk.current("kim")) is not None:
            ordered = sorted(one.answers, key=lambda answer: (answer.origin != "demonstration", len(answer.text), answer.id))
            desk.decide("kim", one.id, [[answer.id] for answer in ordered])
    exported = json.loads(collect("export", f"input={collected / 'tasks'}", f"output={collected / 'ready'}", "--json").stdout)
    assert exported["outputs"][0]["records"] == 24 and exported["origins"]["demonstration"]["best"] == 24
    status = collect("status", f"input={collected}").stdout
    assert "decisions   24: kim 24" in status

    done = run("reward", collected / "reward", f"checkpoint.start={rlhf_chain['pretrain']}", f"chat.path={collected / 'ready' / 'rankings.jsonl'}", "train.steps=12", "train.global_batch_size=8",
               "optim.lr=2e-3", "optim.min_lr=2e-3", "rollout.batch_tokens=512")
    accuracy = [record["accuracy"] for record in records(collected / "reward")]
    assert sum(accuracy[-4:]) / 4 > max(0.6, accuracy[0] - 0.1), accuracy
    assert "record_skipped" not in (collected / "reward" / "events.jsonl").read_text(encoding="utf-8")
    assert "Traceback" not in done.stderr
    # ... and the built pairs are what sft reads.
    run("sft", collected / "sft", f"checkpoint.start={rlhf_chain['pretrain']}", f"chat.path={collected / 'built' / 'sft.jsonl'}", "train.steps=2", "train.global_batch_size=4",
        "train.micro_batch_size=4", "data.sequence_length=64")
