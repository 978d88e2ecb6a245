#!/usr/bin/env bash
# Fail when the module, the notebooks' metadata or the README are not what the notebooks say.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
before=$(git status --porcelain)
nbdev_export
nbdev_clean
python tools/readme.py
after=$(git status --porcelain)
if [ "$before" != "$after" ]; then
    git status --short
    git --no-pager diff --stat
    echo "out of sync: run nbdev_export, nbdev_clean and python tools/readme.py, and commit what they change"
    exit 1
fi
echo "notebooks, module and README are in sync"
