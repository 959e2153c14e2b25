from pathlib import Path

from benchmarks import cost

PAGE = Path(__file__).parents[2] / "docs/performance.md"


def test_the_page_shows_what_the_script_prints(capsys):
    """Line and tables stand in docs/performance.md to the letter; other prose may stand between them."""
    assert cost.main([]) == 0
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert len(printed) == 4
    page = PAGE.read_text(encoding="utf-8")
    assert not [block for block in printed if f"\n\n{block}\n" not in page]


def test_other_number_formats_change_the_times_and_not_the_operations(capsys):
    """Float8 weights halve the bytes of a step, so AsyncVLA's takes half as long or a little more; its operations stay."""
    rows = []
    for numbers in ("bfloat16", "float8"):
        cost.main(["--numbers", numbers])
        line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("| AsyncVLA-3B"))
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    wide, narrow = rows
    assert wide[6] == narrow[6]
    assert 0.5 <= float(narrow[7]) / float(wide[7]) < 0.55
