"""The scripts of a bundle: set it up without an index, and run its recipe without a hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

_ENV = """\
# shellcheck shell=bash
# Sourced: the models and data sets of this folder, and no hub. Recipes name paths from this folder.
bundle=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
export HF_HUB_OFFLINE=1{variables}
"""

_RUN = """\
#!/usr/bin/env bash
# Run all stages of the bundled recipe:  ./run.sh [LAUNCH_FILE [flags for accelerate launch]]
# The same command again resumes. A stage by itself, in this folder: source env.sh; rlhf STAGE {folder}/STAGE.yaml
set -euo pipefail
cd "$(dirname "$(realpath "$0")")"
source ./env.sh
exec launch/pipeline.sh {folder} "$@"
"""

_SITE = """\
# Read by the Slurm scripts at the start of every job (slurm/README.md). Add your site's own lines.
# shellcheck disable=SC1091,SC2154
source "$root/env.sh"
"""

_SETUP = """\
#!/usr/bin/env bash
# Verify the files, and install the wheels of this folder into .venv; no index is asked. PYTHON: an interpreter of the
# version that the wheels are for, Python {python}.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")"
if [ ! -e .verified ]; then   # `rlhf unbundle` has verified them, tar has not
  sha256sum --check --quiet --strict SHA256SUMS
fi
python=${{PYTHON:-python{python}}}
found=$("$python" -c 'import platform, sys; print("%d.%d" % sys.version_info[:2], sys.platform, platform.machine())') || {{
  echo "setup: no $python here; set PYTHON to a Python {python}" >&2
  exit 2
}}
if [ "$found" != "{python} {system} {machine}" ]; then
  echo "setup: $python is Python $found; these wheels are for Python {python} {system} {machine}" >&2
  exit 2
fi
"$python" -m venv .venv
env PIP_CONFIG_FILE=/dev/null .venv/bin/python -m pip --isolated --disable-pip-version-check install --quiet \\
  --no-index --find-links wheels {requirement}
echo "setup: done; run the recipe with ./run.sh"
"""


def launchers(folder: str, has_models: bool, has_cache: bool) -> Iterator[tuple[str, str, bool]]:
    """(name, text, whether it is executable) of the scripts that run a bundle.

    Args:
        folder: of the recipes.
        has_models: set the hub's cache to the bundle's; else models come from that of the machine.
        has_cache: likewise this project's cache, which has the embedded model.
    """
    variables = ' HF_DATASETS_CACHE="$bundle/hub/datasets"'
    variables += ' HF_HUB_CACHE="$bundle/hub/models"' if has_models else ""
    variables += ' RLHF_CACHE="$bundle/cache"' if has_cache else ""
    yield "env.sh", _ENV.format(variables=variables), False
    yield "run.sh", _RUN.format(folder=shlex.quote(folder)), True
    yield "slurm/site.env", _SITE, False


def setup(python: str, system: str, machine: str, requirement: str) -> str:
    """The text of setup.sh.

    Args:
        python: the version that the wheels are for, such as 3.11.
        system, machine: likewise sys.platform and platform.machine().
        requirement: this package with its extras and version.
    """
    return _SETUP.format(python=python, system=system, machine=machine, requirement=shlex.quote(requirement))
