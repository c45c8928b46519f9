"""Validate documents by SkyPilot's and Kubeflow's own code; runs in the environment of requirements.txt.

Stdin: a JSON list of documents. Stdout: a JSON list of what is wrong with each, null if nothing is.
"""

import json
import os
import sys
from pathlib import Path

os.environ["IS_SKYPILOT_SERVER"] = (
    "true"  # a client leaves unknown keys to the server, which judges when plugins are loaded
)
os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
BUCKET = [("BUCKET", "a-name-that-nobody-else-has")]


def validate(document):
    if "apiVersion" in document:
        kubernetes_object(document)
    elif "type" in document:
        sky_volume(document)
    else:
        sky_task(document)


def sky_task(document):
    import sky
    from sky.jobs import recovery_strategy
    from sky.server import plugins

    plugins.load_plugins(None)
    overrides = BUCKET if "BUCKET" in document.get("envs", {}) else None
    task = sky.Task.from_yaml_config(document, env_overrides=overrides)
    for resources in task.resources:  # a strategy is looked for only when the job is launched
        strategy = (resources.job_recovery or {}).get("strategy")
        if strategy is not None:
            recovery_strategy.registry.JOBS_RECOVERY_STRATEGY_REGISTRY.from_str(strategy)


def sky_volume(document):
    from sky.utils import common_utils, schemas
    from sky.volumes.volume import Volume

    common_utils.validate_schema(document, schemas.get_volume_schema(), "volume: ")
    Volume.from_yaml_config(document)


def kubernetes_object(document):
    """Kubeflow's models drop keys that they don't know and convert types, so what comes back must be what went in."""
    import kubeflow.training
    import kubeflow_trainer_api.models as trainer

    version, kind = document["apiVersion"], document["kind"]
    if version == "trainer.kubeflow.org/v1alpha1":
        model = getattr(trainer, f"TrainerV1alpha1{kind}")
        back = json.loads(model.from_dict(document).to_json())
    else:
        known = {"kubeflow.org/v1": f"KubeflowOrgV1{kind}", "v1": f"V1{kind}"}[version]
        if version == "v1":
            from kubernetes import client as package
        else:
            package = kubeflow.training
        client = package.ApiClient()
        answer = type("Answer", (), {"data": json.dumps(document)})
        back = client.sanitize_for_serialization(client.deserialize(answer, getattr(package, known)))
    difference = first_difference(document, back, kind)
    if difference:
        raise ValueError(difference)


def first_difference(sent, back, where):
    if isinstance(sent, dict) and isinstance(back, dict):
        for key in sent:
            if key not in back:
                return f"{where}.{key}: not known"
            if found := first_difference(sent[key], back[key], f"{where}.{key}"):
                return found
    elif isinstance(sent, list) and isinstance(back, list) and len(sent) == len(back):
        for i, (one, other) in enumerate(zip(sent, back, strict=True)):
            if found := first_difference(one, other, f"{where}[{i}]"):
                return found
    elif type(sent) is not type(back) or sent != back:
        return f"{where}: {sent!r} is of another type"
    return None


def main():
    found = []
    for document in json.load(sys.stdin):
        try:
            validate(document)
            found.append(None)
        except Exception as error:  # each library has kinds of its own
            found.append(f"{type(error).__name__}: {error}")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    main()
