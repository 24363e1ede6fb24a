#!/usr/bin/env python3
"""Checks deploy/kubernetes/ without a cluster: against the schemas of Kubernetes, and against the program.

    python3 deploy/check_manifests.py [--treespark PROGRAM] [--venv FOLDER]

Every file is read as YAML. Kubernetes' own kinds must fit the schemas that the package kubernetes-validate brings along,
without a field that a schema does not know. `treespark serve` must take the arguments of the Deployment.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from two_workers import HERE, TREESPARK, VENV, done, environment

VERSIONS = ["1.30", "1.37"]
# Kinds of others, whose schemas are not at hand.
NOT_OURS = {"ServiceMonitor"}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--treespark", default=TREESPARK, type=Path)
    options.add_argument("--venv", default=VENV, type=Path, help="made if it is not there")
    options = options.parse_args()
    python = environment(options.venv)
    if Path(sys.prefix).resolve() != options.venv.resolve():
        raise SystemExit(subprocess.run([python, *sys.argv]).returncode)

    import kubernetes_validate
    import yaml

    for file in sorted((HERE / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            kind = document.get("kind")
            if kind is None or kind in NOT_OURS:
                done(f"{file.name} is YAML")
                continue
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)
            done(f"{file.name}: {kind} fits the schemas of Kubernetes {' and '.join(VERSIONS)}")
            if kind == "Deployment":
                check_arguments(options.treespark, document)


def check_arguments(treespark, deployment):
    """The command line is read as a whole before its help is shown, so a wrong argument is an error."""
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    command = [treespark, *container["args"], "--help"]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    done("treespark takes the Deployment's arguments: " + " ".join(container["args"]))


if __name__ == "__main__":
    main()
