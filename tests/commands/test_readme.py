"""What README and pages promise: links lead somewhere, commands have these options, notebooks have the same code."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from spo_jax import cli

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "examples", "tests") for page in (ROOT / folder).glob("*.md")),
]
NOTEBOOKS = list((ROOT / "examples").glob("*.ipynb"))
CONFIG_OF = {"main": "tiny", "plan": "sdxl", "fetch": "sd15"}


def name(path):
    return path.relative_to(ROOT).as_posix()


def code_cells(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page):
    """``python -m spo_jax.NAME ...`` of the page's code blocks: the command's name and its arguments."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"python -m spo_jax\.(\w+) (.*)", line):
                yield match[1], shlex.split(match[2], comments=True)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("commands", "own_pairs", "data"))],
    ids=name,
)
def test_commands_have_these_options(page):
    found = list(commands(page))
    assert found
    for command, arguments in found:
        sources = "".join((ROOT / "spo_jax" / f"{module}.py").read_text() for module in (command, "cli"))
        config = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), CONFIG_OF.get(command))
        for argument in arguments:
            option = argument.removeprefix("--").partition("=")[0]
            if option.startswith("config."):
                keys: ConfigDict | object = cli.read_config(config)
                for key in option.split(".")[1:]:
                    keys = keys[key]
            else:
                assert f'"{option}"' in sources, f"spo_jax.{command} has no --{option}"


def test_the_quickstart_is_the_notebooks():
    """Which a slow test executes."""
    (block,) = re.findall(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block in code_cells(ROOT / "examples" / "pool_step_by_step.ipynb")


def test_the_workflow_runs_what_a_pull_request_must_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"bash .ci/run", "bash .ci/newest"} <= {step.get("run") for step in steps}
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
