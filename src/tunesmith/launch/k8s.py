"""Kubernetes manifests: an indexed Job with one pod a node, its Service and its recipe."""

from __future__ import annotations

from typing import Any

import yaml

from tunesmith.launch.job import GRACE, PORT, RECIPE, LaunchJob, torchrun_words, train_words

_RECIPES = "/etc/tunesmith"


def k8s_files(job: LaunchJob) -> dict[str, str]:
    """The file by name. `kubectl apply -f job.yaml` starts the job.

    The pods find the first of them by the Service's name. A pod that is ended gets SIGTERM and time
    to save; one that fails is started again and goes on with the run on the shared volume.
    """
    objects = [_config(job), _service(job), _job(job)]
    return {"job.yaml": yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True)}


def _config(job: LaunchJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {RECIPE: job.recipe},
    }


def _service(job: LaunchJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": job.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(job: LaunchJob) -> dict[str, Any]:
    limit = {} if job.hours is None else {"activeDeadlineSeconds": max(60, int(job.hours * 3600))}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": 20 * job.nodes,
            **limit,
            "template": {"metadata": {"labels": {"app": "tunesmith"}}, "spec": _pod(job)},
        },
    }


def _pod(job: LaunchJob) -> dict[str, Any]:
    before, after = train_words(job)
    rendezvous = [f"--rdzv-id={job.name}", f"--rdzv-endpoint={job.name}-0.{job.name}:{PORT}"]
    # A list of words, of which no shell reads any; `$(...)` is the one form that Kubernetes reads.
    words = [*torchrun_words(job), *rendezvous, *before, f"{_RECIPES}/{RECIPE}", *after]
    return {
        "subdomain": job.name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [
            {
                "name": "train",
                "image": job.image,
                "command": [word.replace("$(", "$$(") for word in words],
                "workingDir": job.folder,
                "resources": {"limits": {"nvidia.com/gpu": job.per_node}},
                "volumeMounts": [
                    {"name": "recipe", "mountPath": _RECIPES, "readOnly": True},
                    {"name": "shared", "mountPath": job.mount},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "recipe", "configMap": {"name": job.name}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
