#!/usr/bin/env python3
"""Checks docs/status.md: every test that its tables name exists, and every point has a test or says "missing".

A test is written as `crate::module::test_name` in backticks: the crate's library name (for a crate under tests/, the
name of its file or folder), its modules, its function. `cargo test` knows the same names, but only after building everything. What is measured
and not asserted is written "benchmark `FILE`" or "figures `FILE`".
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
STATUS = ROOT / "docs" / "status.md"


def roots():
    """The first part of a test's name, with the directory and the file in which its path starts."""
    found = {}
    for manifest in subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*Cargo.toml"], cwd=ROOT, text=True
    ).split():
        folder = ROOT / pathlib.Path(manifest).parent
        name = re.search(r'^name = "(.*)"', (ROOT / manifest).read_text(), re.M)
        if not name:
            continue
        for start in ("lib.rs", "main.rs"):
            if (folder / "src" / start).exists():
                found.setdefault(name[1].replace("-", "_"), []).append(folder / "src" / start)
        for file in folder.glob("tests/*.rs"):
            found.setdefault(file.stem, []).append(file)
        for file in folder.glob("tests/*/main.rs"):
            found.setdefault(file.parent.name, []).append(file)
    return found


def exists(start, modules, function):
    """Whether `function` is a test in the module path `modules` below the crate file `start`."""
    folder = start.parent
    file, inline = start, []
    for module in modules:
        beside = folder if file in (start, folder / "mod.rs") else folder / file.stem
        choices = [beside / f"{module}.rs", beside / module / "mod.rs"]
        if not inline and (hit := next((path for path in choices if path.exists()), None)):
            file, folder = hit, hit.parent
        else:
            inline.append(module)
    text = file.read_text()
    if any(not re.search(rf"\bmod {module}\b", text) for module in inline):
        return False
    # The attributes of a test may be several, in any order; proptest's macro takes plain #[test] too.
    return bool(re.search(rf"#\[(?:\w+::)*test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*|//[^\n]*\s*)*(?:async )?fn {function}\b", text))


def main():
    crates, errors, points, missing = roots(), [], 0, 0
    for number, line in enumerate(STATUS.read_text().splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 2 or set(cells[1]) <= set("-: ") or cells[1] == "test":
            continue
        points += 1
        tests = re.findall(r"`([a-z0-9_]+(?:::[a-z0-9_]+)+)`", cells[1])
        # What is measured and not asserted: the file of a benchmark, or the page with its figures.
        shown = re.match(r"(?:benchmark|figures) `([^`]+)`", cells[1])
        if shown:
            if not (ROOT / shown[1]).exists():
                errors.append(f"{number}: no file `{shown[1]}`")
        elif not tests:
            missing += cells[1].startswith("missing")
            if not cells[1].startswith("missing"):
                errors.append(f'{number}: "{cells[0]}" names no test and does not say "missing"')
        for test in tests:
            crate, *modules, function = test.split("::")
            if not any(exists(start, modules, function) for start in crates.get(crate, [])):
                errors.append(f"{number}: no test `{test}`")
    for error in errors:
        print(f"docs/status.md:{error}", file=sys.stderr)
    print(f"{points} points, {missing} missing")
    return 1 if errors or not points else 0


if __name__ == "__main__":
    sys.exit(main())
