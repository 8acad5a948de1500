#!/usr/bin/env bash
# The image's entry point: BentoML's own, with container/start.py where no command is given.
set -euo pipefail
[ $# -gt 0 ] || set -- python "$BENTO_PATH/src/container/start.py"
exec bash "$BENTO_PATH/env/docker/bentoml.sh" "$@"
