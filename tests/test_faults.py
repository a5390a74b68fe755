"""A short fault campaign (benchmarks/fault_campaign.py), and that a campaign finds what is not as declared."""
import sys
from collections import Counter
from dataclasses import replace

import pytest
from small import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fault_campaign
from fault_kinds import DECLARED, chains, drawn


@pytest.mark.timeout(1500)  # a dozen lives, half of them a minute where imports are slow
def test_faults_come_out_as_declared_and_a_wrong_declaration_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(DECLARED, "kill_rank", replace(DECLARED["kill_rank"], codes=(0,)))
    faults = fault_campaign.campaign(tmp_path, ["hang", "kill_rank", "lost_node", "truncated", "nan"], 1, print, steps=40)
    found = {fault.kind: fault for fault in faults}
    assert {kind: found[kind].problems for kind in found if kind != "kill_rank"} == {key: [] for key in ("hang", "lost_node", "truncated", "nan")}
    assert [text.split(":")[0] for text in found["kill_rank"].problems] == ["exit code 137"]
    assert all(fault.seconds is not None for fault in faults)


def test_how_faults_are_drawn():
    kinds = drawn(100, 1, list(DECLARED))
    assert Counter(kinds) == {kind: declared.share for kind, declared in DECLARED.items()}
    assert kinds == drawn(100, 1, list(DECLARED)) != drawn(100, 2, list(DECLARED))
    assert Counter(drawn(len(DECLARED), 1, list(DECLARED))) == dict.fromkeys(DECLARED, 1)
    assert Counter(drawn(3, 1, ["hang", "nan"])) == {"hang": 2, "nan": 1}
    assert len(drawn(1, 1, list(DECLARED))) == 1


def test_a_full_disk_is_the_last_of_a_run():
    assert chains(["term", "nan", "full_disk", "hang", "usr1", "other_ranks"], 2) == [["term", "hang", "full_disk"], ["usr1"]]
    assert chains(["full_disk", "full_disk", "term"], 2) == [["term", "full_disk"], ["full_disk"]]


@pytest.mark.parametrize("words", [["--only", "nan,rain"], ["--faults", "0"]])
def test_what_is_no_campaign_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fault_campaign.py", *words])
    with pytest.raises(SystemExit) as found:
        fault_campaign.main()
    assert found.value.code == 2 and words[0] in capsys.readouterr().err
