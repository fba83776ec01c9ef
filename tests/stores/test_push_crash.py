"""A push that ends at any request leaves the old build or the new one, and the next push ends it.

The Hub fails from the n-th request on that changes something, for each n: with an error, or after
it has carried the request out and the response was lost. A writer that breaks the rules shows that
the harness detects failures.
"""

from __future__ import annotations

from copy import deepcopy

import pytest

from sftprep import build, push, read_manifest
from sftprep.errors import HubError, OutputBusy
from sftprep.pipeline.output import hub as output_hub
from sftprep.pipeline.output import push as push_module
from sftprep.stores.hub import HubRepository
from tests.stores.builds import example_lines, small_settings
from tests.stores.loopback_hub import digest_seen

NAME = "org/name"


@pytest.fixture(scope="module")
def builds(tmp_path_factory, tokenizer_dir):
    root = tmp_path_factory.mktemp("builds")
    (root / "rows.jsonl").write_bytes(example_lines(0, 8))
    for name, settings in {"old": {"seed": 1}, "new": {"seed": 2, "eval_fraction": 0.3}}.items():
        build(
            str(root / "rows.jsonl"),
            output=str(root / name),
            **small_settings(tokenizer_dir, **settings),
        )
    return root


def fail_at_each_request(hub, builds, *, before):
    """Push the new build with a failure at each request, one after the other; return the builds
    that readers saw after the failures."""
    old, new = (read_manifest(builds / name).digest for name in ("old", "new"))
    if before == "old":
        push(builds / "old", NAME)
    repos, objects, seen = deepcopy(hub.repos), dict(hub.objects), []
    for number in range(1_000):
        hub.repos, hub.objects = deepcopy(repos), dict(objects)
        hub.changes, hub.fails_from = 0, number
        try:
            push(builds / "new", NAME, overwrite=True)
            failed = False
        except HubError:
            failed = True
        was_reached, hub.fails_from = hub.changes > number, None
        if ("datasets", NAME) in hub.repos:
            seen.append(digest_seen(NAME))
            assert seen[-1] in ((old if before == "old" else None), new)
        push(builds / "new", NAME, overwrite=True)
        assert digest_seen(NAME) == new
        assert not failed or was_reached
        if not was_reached:
            return seen
    raise AssertionError("the push never ended")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_push_to_a_hub_that_fails_leaves_the_old_build_or_the_new_one(
    hub, builds, before, monkeypatch
):
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 4)
    hub.status = 500
    seen = fail_at_each_request(hub, builds, before=before)
    assert len(seen) > 8
    assert seen.count(read_manifest(builds / "new").digest) >= 1


def test_a_push_whose_response_is_lost_leaves_the_old_build_or_the_new_one(
    hub, builds, monkeypatch
):
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 4)
    hub.status, hub.loses_response = 0, True
    seen = fail_at_each_request(hub, builds, before="old")
    # The last commits were carried out, though the push failed.
    assert seen.count(read_manifest(builds / "new").digest) >= 2


def test_a_lost_response_is_recognized_if_the_hub_can_be_reached_again(hub, builds):
    push(builds / "old", NAME)
    hub.loses_response, hub.fails_once, hub.status = True, True, 0

    def lose_the_manifest(self, additions, removed, **options):
        if any(each.path_in_repo == "manifest.json" for each in additions):
            hub.fails_from = hub.changes + 1  # after the request that validates the data card
        return commit(self, additions, removed, **options)

    commit = HubRepository.commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubRepository, "commit", lose_the_manifest)
        pushed = push(builds / "new", NAME, overwrite=True)
    assert pushed.commit == hub.repos["datasets", NAME].heads["main"]
    assert digest_seen(NAME) == read_manifest(builds / "new").digest


def test_the_harness_detects_a_manifest_that_is_committed_first(hub, builds, monkeypatch):
    def publish_manifest_first(repository, replaced, files, manifest, **options):
        head = repository.head()
        repository.commit(repository.upload([manifest]), (), parent=head, message="first")
        replaced = repository.find_file(repository.head(), "manifest.json")
        return output_hub.publish(repository, replaced, files, manifest, **options)

    monkeypatch.setattr(push_module, "publish", publish_manifest_first)
    with pytest.raises((AssertionError, OutputBusy)):
        fail_at_each_request(hub, builds, before="old")
