"""What a load prints."""

from modsurg.checkpoints.load.report import LoadReport, Problems


def test_a_long_list_is_cut():
    report = LoadReport(["a"], [f"layer{i}" for i in range(25)])
    lines = str(report).splitlines()
    assert lines[0] == "loaded 1 of 26 keys"
    assert lines[-1] == "  missing  ... and 15 more"
    assert len(lines) == 12


def test_problems_stand_under_each_other():
    problems = Problems(total=3, misfits={"a": "too wide"}, missing={"long.name": ""}, advice="Mend it")
    assert str(problems.error()) == (
        "2 of 3 keys do not match; nothing was loaded.\n  a  too wide\n  long.name  not in the file\nMend it"
    )


def test_what_the_file_alone_has_is_counted_by_itself():
    problems = Problems(total=3, unexpected={"a": ""})
    assert str(problems.error()).startswith("1 key of the file is not in the model; nothing was loaded.\n")
    problems.missing = {"b": "", "c": ""}
    start = "2 of 3 keys do not match, and 1 key of the file is not in the model; nothing was loaded.\n"
    assert str(problems.error()).startswith(start)


def test_truth():
    assert LoadReport(["a"])
    assert not LoadReport(["a"], missing=["b"])
    assert not LoadReport(["a"], sliced={"b": "shapes"})
    assert not Problems(total=3)
