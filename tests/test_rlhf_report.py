"""rlhf/report.py: the report of whole, short, broken and resumed stages; its plots; samples before and after."""
import html
import json
import math
import re

import pytest
from test_observe_report import png_size, run, table

from megatron_ext.config.compose import compose, to_yaml
from megatron_ext.observe.lines import LineFile
from megatron_ext.observe.report import Run
from rlhf import plots, report, samples


def iteration(step: int, **more) -> dict:
    return {
        "step": step, "loss": -0.01, "reward": 0.1 * step, "kl_k1": 0.5 * step, "kl_k3": 0.6 * step, "kl_coef": 0.05, "entropy": 2 - 0.05 * step,
        "clip_fraction": 0.01 * step, "ratio_max": 1.5, "first_ratio_max": 1.0, "explained_variance": 0.1 * step, "value_loss": 1 / step,
        "response_length": 20.0 + step, "eos_rate": 0.5, "logprob_difference": 1e-6 * step, "share_rollout": 0.7, "share_scoring": 0.1,
        "share_update": 0.2, "episodes": 32 * step, "tokens_per_second": 100.0, "lr": 1e-5, "grad_norm": 1.0, "skipped_prompts": 3, **more,
    }


def sample(step: int, prompt: str, response: str, reward: float, **more) -> dict:
    return {"step": step, "prompt": prompt, "response": response, "reward": reward, "kl": 0.0, "stop": "eod", **more}


def write_samples(directory, lines) -> None:
    file = LineFile(directory / "samples.jsonl")
    for line in lines:
        file.append(line)
    file.close()


def pictures(text: str) -> list[str]:
    return re.findall(r"!\[.*?\]\((.*?)\)", text)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """A run of ten iterations that ends at its KL budget, with its report."""
    directory = tmp_path_factory.mktemp("ppo")
    records = [iteration(step) for step in range(1, 11)]
    for record in records[4::5]:
        record |= {"validation_reward": record["reward"] + 0.05, "validation_kl_k1": record["kl_k1"], "validation_response_length": 25.0}
    reason = "at iteration 10 the KL to the reference of its rollouts was 5.000 nats a response, above the budget of 4.8"
    run(directory, records, [
        ("start", {"step": 0}), ("record_skipped", {"file": "a.jsonl", "line": 3, "reason": "is no JSON", "count": 7}),
        ("samples", {"step": 0, "reward": 0.1, "reward_error": 0.03}), ("best", {"step": 5}), ("resume", {"step": 5}),
        ("record_skipped", {"file": "a.jsonl", "line": 3, "reason": "is no JSON", "count": 2}),
        ("reward_failed", {"step": 7, "function": "code", "reason": "took longer than 10 s", "count": 4}),
        ("reward_failed", {"step": 8, "function": "code", "reason": "raised ValueError", "count": 1}),
        ("samples", {"step": 10, "reward": 0.6, "reward_error": 0.04}),
        ("stop", {"step": 10, "reason": reason, "criterion": "kl_budget", "elapsed": 75.0, "checkpoint": "/runs/ppo/checkpoints/step_00000005"}),
    ])
    (directory / "config.yaml").write_text(to_yaml(compose(["stage=ppo", "stop.kl_budget=4.8"])))
    write_samples(directory, [sample(0, "q1", "old\n\nlines | <b>&", 0.25), sample(0, "q2", "x", 0.5), sample(0, "only once", "x", 0.0),
                              sample(10, "q1", "`new`\n```\n</pre>", 1.0), sample(10, "q2", "", 0.5, stop="max_tokens")])
    link = {"stage": "ppo", "step": 5, "hash": "a" * 64, "path": "/p", "parent": "b" * 64, "data": {"sources": ["c" * 64]},
            "roles": [{"role": "reference", "path": "/s", "hash": "b" * 64}, {"role": "reward", "path": "/r", "hash": "d" * 64}]}
    gone = {"hash": "b" * 64, "path": "/s", "broken": "is not there any more"}
    path = report.write_report(directory, title="ppo", chain=[link, gone], sections={"Machine": {"cores": 2}})
    return directory, path.read_text(encoding="utf-8")


def test_the_verdict_says_criterion_and_checkpoint(ppo):
    _, text = ppo
    assert text.startswith("# ppo\n\nStopped because at iteration 10 the KL to the reference of its rollouts was 5.000 nats")
    assert "(criterion: `kl_budget`). The next stage starts from `/runs/ppo/checkpoints/step_00000005`, the best of its validations (step 5)." in text


def test_the_table_of_a_policy(ppo):
    rows = table(ppo[1])
    assert rows["iterations"] == "10" and rows["episodes"] == "320" and rows["wall time"] == "1m 15s" and rows["resumed"] == "1 time"
    assert rows["reward of rollouts, first -> last"] == "0.100 -> 1.000"
    assert rows["KL (k1) of rollouts, first -> last"] == "0.500 -> 5.000 nats a response (budget 4.8)"
    assert rows["reward of held-out prompts, before -> after"] == "0.100 ± 0.030 -> 0.600 ± 0.040"
    assert rows["gain"] == "+0.500, +10.0 standard errors"  # .5 / hypot(.03, .04)
    assert rows["answers that got a greater reward"] == "1 of 2 (0 a smaller one)"
    assert rows["ratio at the first inner step, largest"] == "1.0" and rows["clip fraction, mean"] == "5.500%"
    assert rows["train against generate, largest difference of a logprob"] == "1e-05 nats"
    assert rows["time of an iteration, median"] == "rollout 70 %, scoring 10 %, update 20 %"
    assert rows["records skipped or cut"] == "2", "each life says it again"
    assert rows["reward function code failed"] == "5 times, such as: took longer than 10 s" and rows["prompts skipped"] == "3"


def test_reward_against_kl_is_the_first_plot(ppo):
    directory, text = ppo
    assert pictures(text) == ["reward_kl.png", "policy.png", "critic.png", "phases.png", "throughput.png", "optimizer.png"]
    for name in pictures(text):
        width, height = png_size(directory / name)
        assert width > 900 and height > 300


def test_samples_side_by_side_are_text_and_no_markup(ppo):
    directory, text = ppo
    page = (directory / "samples.md").read_text(encoding="utf-8")
    assert "2 held-out prompts, answered at step 0 and at step 10." in page and "only once" not in page
    assert "[All 2 of them](samples.md)" in text and "**1**, reward +0.750" in page and "ends by max_tokens" in page and "<pre>(empty)</pre>" in page
    assert "<td valign=\"top\"><pre>old&#10;&#10;lines | &lt;b&gt;&amp;</pre></td><td valign=\"top\"><pre>`new`&#10;```&#10;&lt;/pre&gt;</pre></td>" in page
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert len(tables) == 2 and not any("\n\n" in one for one in tables), "an empty line would end the table"
    assert html.unescape(re.search(r"<pre>(old.*?)</pre>", page)[1]) == "old\n\nlines | <b>&"


def test_the_chain_stands_there_origin_first(ppo):
    part = ppo[1].split("## Where it comes from")[1]
    lines = [line for line in part.splitlines() if line.startswith("| ")][2:4]
    assert lines[0] == f"| ? | - | {'b' * 12} | - | /s: is not there any more |"
    assert lines[1] == f"| ppo | 5 | {'a' * 12} | {'b' * 12} | sources {'c' * 12}, reward {'d' * 12} |"
    assert "| cores | 2 |" in ppo[1] and "config.yaml" in ppo[1]


def test_a_reward_model(tmp_path):
    records = [{"step": step, "loss": 0.7 - step / 100, "accuracy": 0.5 + step / 40, "margin": step / 10, "lr": 1e-5} for step in range(1, 11)]
    records[4] |= {"validation_loss": 0.6, "validation_accuracy": 0.8, "validation_calibration_error": 0.05, "validation_pairs": 400.0}
    records[9] |= {"validation_loss": 0.65, "validation_accuracy": 0.75, "validation_calibration_error": 0.1, "validation_pairs": 400.0}
    bins = [[100, 0.6, 0.55], [300, 0.9, 0.85]]
    run(tmp_path, records, [("start", {"step": 0}), ("calibration", {"step": 10, "bins": bins}), ("best", {"step": 5}),
                            ("stop", {"reason": "all 10 steps are done", "criterion": "steps"})])
    text = report.write_report(tmp_path, title="reward").read_text()
    rows = table(text)
    assert rows["held-out pairs in the right order, last (best)"] == "75.0% (80.0%)" and rows["held-out pairs in the right order, at step 5"] == "80.0%"
    assert rows["held-out loss, last (best)"] == "0.6500 (0.6000)" and rows["calibration error, last (best)"] == "0.100 (0.050)"
    assert rows["against chance"] == "400 pairs: half right is 50.0 % ± 2.5%; +10.0 standard errors"
    assert pictures(text) == ["accuracy.png", "reliability.png", "loss.png", "optimizer.png"]
    assert "calibration | step 10 |" in text, "bins are no word of an event"


def test_text_stages_and_dpo(tmp_path):
    sft = run(tmp_path / "sft", [{"step": s, "loss": 3.0 - s / 10, "validation_loss": 2.5} for s in range(1, 4)])
    text = report.write_report(sft, title="sft", bytes_per_token=2.0).read_text()
    assert "nats per token" in text and "bits per byte" in text and pictures(text) == ["loss.png"]
    dpo = run(tmp_path / "dpo", [{"step": 1, "loss": 0.69, "accuracy": 0.6, "margin": 0.1, "chosen_reward": 0.1, "rejected_reward": 0.0}])
    rows = table(report.write_report(dpo, title="dpo").read_text())
    assert rows["training loss, first -> last"] == "0.6900 -> 0.6900 nats a pair"


@pytest.mark.parametrize("records", [
    [], [iteration(1)], [{"step": 1, "kl_k1": math.nan, "reward": math.inf}], [{"step": 1, "kl_k1": 1.0}],
    [{"step": 1, "reward": 1.0, "kl_k1": 0.0}, {"step": 2, "validation_reward": 1.0, "validation_kl_k1": 0.0}],
])
def test_short_and_broken_runs(tmp_path, records):
    run(tmp_path, records, [("start", {"step": 0})])
    (tmp_path / "config.yaml").write_text("stage: {name: 3}")
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "prompt": "q"}\n{"step": 0, "prom')
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    text = report.write_report(tmp_path, title="t").read_text()
    assert "still going on, or was killed" in text and not (tmp_path / "samples.md").exists()
    assert all((tmp_path / name).exists() for name in pictures(text))


def test_pairs_when_steps_and_prompts_repeat(tmp_path):
    write_samples(tmp_path, [sample(0, "q", "first life", 0.0), sample(0, "q", "second life", 0.1), sample(3, "q", "killed", 0.2),
                             sample(9, "q", "end", math.nan), {"no": "sample"}, {"step": 9, "prompt": 3}])
    (pair,) = samples.read_pairs(tmp_path / "samples.jsonl")
    assert (pair.before["response"], pair.after["response"], pair.gain) == ("second life", "end", None)
    assert samples.read_pairs(tmp_path / "none.jsonl") == []
    long = samples.side_by_side(samples.Pair("p" * 9000, {}, {"response": None}), 1)
    assert "(5,000 characters more)" in long and "(empty)" in long


def test_pieces_can_stand_on_another_page(ppo):
    directory, _ = ppo
    parts = "\n\n".join(report.stage_parts(Run.read(directory), prefix="ppo/", level=3))
    assert "### Reward against KL\n\n![Reward against KL](ppo/reward_kl.png)" in parts and "(ppo/samples.md)" in parts


def test_plots_of_one_iteration_and_of_many(tmp_path):
    assert plots.plot_phases(tmp_path / "one.png", [iteration(1)]) and not plots.plot_phases(tmp_path / "none.png", [{"step": 1, "share_rollout": 1.0}])
    many = [json.loads(json.dumps(iteration(step))) for step in range(1, 200)]
    assert plots.plot_policy(tmp_path / "many.png", many, budget=10.0, restarts=[50]) and not (tmp_path / "none.png").exists()
