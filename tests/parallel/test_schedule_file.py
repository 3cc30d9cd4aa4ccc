"""A user's schedule: what is written is read back, and every mistake is named with file, line, rule and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import ConfigError, RunError
from megalm.parallel.schedule_file import KEY, read_schedule, write_schedule
from megalm.parallel.schedules import SCHEDULES, build_schedule
from tests.parallel.test_schedules import chunks_for

GOOD = "0F0,0F1, ,0B0,,0B1\n   ,1F0,1B0,1F1,1I1,1W1\n\n"  # 2 ranks, 2 microbatches


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_is_read_back(name, tmp_path):
    schedule = build_schedule(name, 3, 5, chunks_for(name, 2))
    write_schedule(schedule, str(tmp_path / "s.csv"))
    again = build_schedule("csv", 3, 5, schedule.num_chunks, str(tmp_path / "s.csv"))
    assert (again.actions, again.ranks_of_stages) == (schedule.actions, schedule.ranks_of_stages)
    assert [again.stages_of(rank) for rank in range(3)] == [schedule.stages_of(rank) for rank in range(3)]


def test_a_file_by_hand(tmp_path):
    file = tmp_path / "s.csv"
    file.write_text("\ufeff" + GOOD, encoding="utf-8")
    schedule = read_schedule(str(file), 2, 2, 1)
    assert [" ".join(map(str, actions)) for actions in schedule.actions] == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1I1 1W1"]
    file.write_text("1F0,1B0\n0F0,0B0")  # ranks may be in any order along the model
    assert read_schedule(str(file), 2, 1, 1).placement == (1, 0)


@pytest.mark.parametrize(
    ("text", "rule", "fix"),
    [
        (GOOD.replace("0F1", "0G1"), "line 1: cannot read cell '0G1'; a cell is", ""),
        (GOOD.replace("1W1", "1W1;"), "line 2: cannot read cell '1W1;'", ""),
        (GOOD.replace("0F1", "9" * 30), "line 1: cannot read cell '99999999999999999999'", ""),
        (GOOD.replace(",0B1", ""), "line 1: 0B1 is missing", "add 0B1 to this line"),
        (GOOD.replace(",1W1", ""), "line 2: 1W1 is missing", "add 1W1 to this line"),
        (GOOD.replace("0B1", "0B1,0F1"), "line 1: 0F1 is there twice", "remove one of the two"),
        (GOOD.replace("1I1,1W1", "1I1,1W1,1B1"), "line 2: 1B1: the backward of stage 1, microbatch 1", "remove one of the two"),
        (GOOD.replace("1I1,1W1", "1W1,1I1"), "line 2: 1W1 comes before its other half 1I1", "put it later in the line"),
        (GOOD.replace("1F0,1B0", "1B0,1F0"), "line 2: 1B0 comes before its forward 1F0", "put it later in the line"),
        (GOOD.replace("0B1", "0B1,1F1"), "line 2: stage 1 is on line 1 too", "all cells of a stage in one line"),
        (GOOD.replace("1", "2").replace("0F2", "0F1").replace("0B2", "0B1"), "has 3 microbatches, and a step", "a file for 2"),
        (GOOD + "2F0,2B0", "has 4 lines, and there are 2 pipeline ranks", "parallel.pipeline_parallel=4"),
        ("", "has 0 lines, and there are 2 pipeline ranks", "a file with 2 lines"),
        ("0F0,1F0,1B0,0B0\n2F0,3F0,3B0,2B0", "has 1 microbatches, and a step has 2", "a file for 2"),
        (GOOD.replace("1F0", "2F0"), "line 2: has 2 stages, and parallel.chunks is 1", "1 in every line"),
        (
            "0F0,0F1,1F0,1F1,1B0,1B1,0B0,0B1\n2F0,2F1,3F0,3F1,3B0,3B1,2B0,2B1",
            "line 1: has 2 stages, and parallel.chunks is 1",
            "parallel.chunks=2",
        ),
        ("0F0,0F1,0B0,0B1\n4F0,4F1,4B0,4B1", "line 2: stage 4 is there and stage 1 is not; stages are 0 to 1", "without gaps"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", "can never finish: rank 0 at 0B0, which needs 0F0 and", "move the action"),
    ],
)
def test_mistakes_are_named(text, rule, fix, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_schedule(str(file), 2, 2, 1)
    assert {(problem.key, problem.value) for problem in caught.value.problems} == {(KEY, str(file))}
    assert any(rule in problem.rule and fix in problem.fix for problem in caught.value.problems), str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.csv", tmp_path, Path("a\0b")):
        with pytest.raises(ConfigError, match="cannot read this file"):
            read_schedule(str(path), 1, 1, 1)
    with pytest.raises(RunError, match=r"pipeline\.csv"):
        write_schedule(build_schedule("1f1b", 1, 1, 1), str(tmp_path / "no" / "s.csv"))


def test_hundreds_of_faults_fit_on_a_page(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(",".join(f"0B{m}" for m in range(300)))
    with pytest.raises(ConfigError) as caught:
        read_schedule(str(file), 1, 300, 1)
    assert len(caught.value.problems) == 13
    assert "more of the kind" in caught.value.problems[-1].rule
