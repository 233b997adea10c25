"""Every example workflow fits the nodes as they are: nothing missing, nothing red."""

import pytest
from PIL import Image

from tests import workflows


@pytest.fixture(params=workflows.FILES, ids=lambda path: path.name)
def workflow(request):
    return workflows.read(request.param)


def test_there_is_a_workflow_for_each_use():
    names = {path.stem for path in workflows.FILES}
    assert names == {"text_to_video", "image_to_video", "video_to_video", "text_to_video_lora"}


def test_its_nodes_exist_with_their_sockets_in_order(workflow, pack):
    workflows.check_sockets(workflow, pack)


def test_its_widget_values_are_allowed(workflow, pack):
    workflows.check_widgets(workflow, pack)


def test_its_links_join_sockets_of_one_type(workflow):
    workflows.check_links(workflow)


def test_every_required_socket_is_connected(workflow, pack):
    workflows.check_required(workflow, pack)


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
def test_it_has_a_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 200
