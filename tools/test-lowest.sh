#!/usr/bin/env bash
# Install the lowest version of every dependency that pyproject.toml declares into .venv-lowest, once, and run tests with them.
#
#   tools/test-lowest.sh [PYTEST ARGUMENT...]
#   LOWEST="torch=2.13.0" tools/test-lowest.sh    where that version cannot be had: another one, which is printed
#
# Not run by CI: it downloads another torch. The tests are those of files, data, networks, training, evaluation and serving. Left
# to `make test` are what draws pictures (Meta-World, LIBERO), the browser, and the extras vlm and lora, where transformers itself
# demands newer versions of the others.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=(train viz tokens hub serve)
tools=(pytest pytest-timeout hypothesis)
tests=(
    tests/test_io.py tests/test_outputs.py tests/test_hub.py tests/test_spec.py tests/test_ranges.py
    tests/actions tests/data tests/decoders tests/flows tests/nn tests/backbones/test_tiny.py
    tests/training/test_trainer.py tests/training/test_tokens.py
    tests/simulators/test_recording.py tests/serving/test_requests.py tests/crashes
)

venv=.venv-lowest
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
read -ra replaced <<<"${LOWEST:-}"
"${PYTHON:-python3}" tools/lowest.py "${extras[@]}" "${replaced[@]}" >"$wanted"
[ ${#replaced[@]} = 0 ] || echo "Not the declared versions: ${replaced[*]}" >&2

if ! cmp -s "$wanted" $venv/lowest.txt; then
    rm -rf $venv
    "${PYTHON:-python3}" -m venv $venv
    $venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$wanted" \
        --editable ".[$(IFS=,; echo "${extras[*]}")]" "${tools[@]}" "gymnasium>=1.1"
    cp "$wanted" $venv/lowest.txt
fi
$venv/bin/python -m pip check --disable-pip-version-check || true # packages that are not used together may disagree
without=() # they need Meta-World before they write
for command in demo reproduce; do
    without+=(--deselect "tests/crashes/test_crashes.py::test_where_nothing_can_be_written_a_command_says_so_before_it_works[$command]")
done
exec $venv/bin/python -m pytest -p no:cacheprovider "${tests[@]}" "${without[@]}" "$@"
