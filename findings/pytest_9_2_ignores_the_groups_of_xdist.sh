#!/usr/bin/env bash
# One would guess: tests of one `xdist_group` run in one worker with `--dist loadgroup`, with any pytest that pytest-xdist
# 3.8.0 can be installed beside.
# What happens (pytest 9.2.0, pytest-xdist 3.8.0, seen 2026-11-30): with pytest 9.1.1 they do. With 9.2.0 they are spread
# over the workers, without a warning (pytest-xdist issue 1386). What a group shares is then made once a worker.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat > test_group.py <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(12))
def test_of_a_group(number, worker_id):
    time.sleep(0.1)
    with open("workers", "a") as file:
        file.write(worker_id + "\n")
PYTHON
found=""
for version in 9.1.1 9.2.0; do
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pytest==$version pytest-xdist==3.8.0
    rm -f workers
    "$folder/venv/bin/python" -m pytest --quiet --numprocesses 2 --dist loadgroup test_group.py > /dev/null
    workers=$(sort -u workers | wc -l)
    echo "pytest $version: $workers of 2 workers ran the group"
    found="$found $workers"
done
if [ "$found" = " 1 2" ]; then
    echo "the group is spread"
else
    echo "CHANGED: the group is in one worker with both, or with neither"
    exit 1
fi
