import inspect

import pytest

from difftrain_utils.media.media import MEDIA, Media


@pytest.mark.parametrize("medium", {module.__name__: module for module in MEDIA.values()}.values())
def test_a_medium_has_all_that_is_asked_of_one(medium):
    assert all(hasattr(medium, name) for name in Media.__annotations__)
    methods = {name: method for name, method in vars(Media).items() if callable(method) and name[0] != "_"}
    assert {"check", "place", "read", "save"} <= methods.keys()
    for name, method in methods.items():
        _, *asked = inspect.signature(method).parameters
        assert list(inspect.signature(getattr(medium, name)).parameters) == asked, name
