#!/usr/bin/env python3
"""The end of a test run: the ten slowest tests, those that passed only when run again, then `N passed, N failed`. Fails when a
test failed or was skipped.

report.py junit FILE   what cargo-nextest wrote
report.py cargo FILE   the output of `cargo test`; it times whole test binaries only
"""

import re
import sys
import xml.etree.ElementTree as ElementTree


def junit(path):
    """(name, seconds) of each test, how many passed, failed and were skipped, and the names of those that passed when run again."""
    times, failed, skipped, again = [], 0, 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')} {case.get('name')}"
        times.append((name, float(case.get("time", 0))))
        if any(case.find(tag) is not None for tag in ("flakyFailure", "flakyError")):
            again.append(name)
        failed += any(case.find(tag) is not None for tag in ("failure", "error"))
        skipped += case.find("skipped") is not None
    return times, len(times) - failed - skipped, failed, skipped, again


def cargo(path):
    """(name, seconds) of each test binary, and how many tests passed, failed and were skipped."""
    times, passed, failed, skipped, name = [], 0, 0, 0, "?"
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if running := re.match(r"\s+Running (?:unittests )?(.*)", line):
                name = running[1].strip()
            elif result := re.match(
                r"test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored;.* finished in ([\d.]+)s", line
            ):
                passed, failed, skipped = (
                    total + int(more) for total, more in zip((passed, failed, skipped), result.groups())
                )
                times.append((name, float(result[4])))
    return times, passed, failed, skipped, []


def main():
    kind, path = sys.argv[1:]
    try:
        times, passed, failed, skipped, again = {"junit": junit, "cargo": cargo}[kind](path)
    except (OSError, ElementTree.ParseError) as error:
        # Nothing was run: the build broke, and its errors stand above.
        print(f"no report of the tests: {error}", file=sys.stderr)
        print("0 passed, 1 failed")
        return 1
    print("\nThe ten slowest:")
    for name, seconds in sorted(times, key=lambda item: -item[1])[:10]:
        print(f"  {seconds:8.2f} s  {name}")
    for name in again:
        print(f"\nfailed at first and passed when run again, which is a bug to be found (its output is above): {name}")
    if skipped:
        print(f"\n{skipped} skipped: a test is run or removed, never skipped")
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed or skipped else 0


if __name__ == "__main__":
    sys.exit(main())
