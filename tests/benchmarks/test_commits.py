"""The comparison with an earlier commit: what is checked out, and what the page says."""

from support import complaint

from benchmarks import commits


def test_files_of_a_commit_are_written_beside_this_tree(tmp_path):
    name = commits.check_out("HEAD", tmp_path)
    assert len(name) == 40
    assert (tmp_path / "main.py").exists()
    assert (tmp_path / "models" / "ops").is_dir()


def test_unknown_commit_and_no_turns_are_refused(tmp_path):
    assert "no commit nowhere" in complaint(commits.check_out, "nowhere", tmp_path)
    assert "--turns must be at least 1" in complaint(commits.main, ["HEAD", "--turns", "0"])


def test_failing_command_is_named_with_its_last_line(tmp_path):
    (tmp_path / "main.py").write_text("print('well')\nraise SystemExit('no data')\n")
    assert complaint(commits.run, tmp_path, "main.py", "--fast").endswith("no data")


def test_page_compares_medians():
    before = [{"quickstart": seconds} for seconds in (80.0, 90.0, 300.0)]
    now = [{"quickstart": seconds} for seconds in (81.0, 79.0, 10.0)]
    machine = commits.describe_machine(commits.torch.device("cpu"))
    text = commits.report({"machine": machine, "commit": "0123456789", "turns": {"before": before, "now": now}})
    assert "0123456" in text
    assert "| quickstart | 90.000 | 79.000 | 0.878 |" in text
