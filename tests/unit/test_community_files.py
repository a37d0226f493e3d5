"""Files that a hosting platform reads: citation, issue forms, the security policy."""

import re
from pathlib import Path

import pytest
import yaml

import kdtrain

ROOT = Path(__file__).resolve().parents[2]
FORMS = ROOT / ".github/ISSUE_TEMPLATE"


def test_the_citation_has_the_version_and_license_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    license_line = re.search(r'license="(.+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (kdtrain.__version__, license_line[1])
    assert {"message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("name", ["bug_report.yml", "feature_request.yml"])
def test_an_issue_form_has_what_the_platform_requires(name):
    form = yaml.safe_load((FORMS / name).read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for field in form["body"]:
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]


def test_a_bug_report_asks_for_the_table_of_check_setup():
    form = yaml.safe_load((FORMS / "bug_report.yml").read_text(encoding="utf-8"))
    required = {field.get("id") for field in form["body"] if field.get("validations", {}).get("required")}
    assert required == {"what", "commit", "setup", "configuration", "traceback"}
    (setup,) = (field for field in form["body"] if field.get("id") == "setup")
    (script,) = set(re.findall(r"launch/\w+\.py", setup["attributes"]["description"]))
    assert script == "launch/check_setup.py"
    assert (ROOT / script).is_file()


def test_nothing_runs_code_of_a_model_folder_or_opens_a_pickle():
    """What SECURITY.md says."""
    sources = [*(ROOT / "kdtrain").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    calls = re.compile(r"trust_remote_code *=|torch\.load\(|pickle\.loads?\(|Unpickler|allow_pickle|yaml\.unsafe_load")
    found = [f"{path.relative_to(ROOT)}: {call}" for path in sources for call in calls.findall(path.read_text("utf-8"))]
    assert len(sources) > 100
    assert not found
