"""What is quoted to a person holds no password, signature or token; what is harmless stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.redaction import hide_address_secrets, hide_secrets, holds_address_secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:pa55@bucket/a", "s3://…@bucket/a"),
        ("see https://user@host:80/x and ftp://a:b@c", "see https://…@host:80/x and ftp://…@c"),
        ("s3://key:ab/cd+e@f@bucket/a", "s3://…@bucket/a"),
        ("https://h/a.mp4?X-Amz-Signature=ab12&x=1", "https://h/a.mp4?X-Amz-Signature=…&x=1"),
        ("https://h/a?x=1&X-Amz-Credential=AK%2F1&X-Amz-Security-Token=zz", None),
        ("'https://acc.blob/c?sv=2020&sig=Zm9v%3D'", "'https://acc.blob/c?sv=2020&sig=…'"),
        ("https://storage/x?GoogleAccessId=a@b&Signature=cc", "https://storage/x?GoogleAccessId=a@b&Signature=…"),
        ("https://api/x?access_token=1234#frag", "https://api/x?access_token=…#frag"),
    ],
)
def test_addresses_lose_their_secrets_and_keep_the_rest(text: str, shown: str | None) -> None:
    assert holds_address_secret(text)
    hidden = hide_address_secrets(text)
    assert hidden == shown or shown is None
    assert not holds_address_secret(hidden)
    assert "zz" not in hidden
    assert "AK%2F1" not in hidden


@pytest.mark.parametrize(
    "text",
    [
        "/data/clips",
        "s3://bucket/prefix",
        "http://host:80/a@2x.png",
        "mail me@home?sig=1",
        "https://h/x?frames=9&key_frames=3#a@b",
        "a:b@c",
        "",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert hide_address_secrets(text) == text
    assert not holds_address_secret(text)


def test_values_of_variables_that_are_named_like_secrets_are_hidden() -> None:
    environment = {
        "HF_TOKEN": "hf_abcdefgh",
        "WANDB_API_KEY": "12345678",
        "HOME": "/home/someone",
        "TOKEN_FILE": "/a/b/cc",
    }
    text = "401 for hf_abcdefgh by 12345678 in /home/someone with /a/b/cc"
    assert hide_secrets(text, environment) == "401 for … by … in /home/someone with /a/b/cc"
    assert hide_secrets("a short one", {"X_TOKEN": "short"}) == "a short one"
    nested = {"A_SECRET": "abcdefgh", "B_SECRET": "abcdefghijkl"}
    assert hide_secrets("abcdefghijkl", nested) == "…"


@given(st.text(st.characters(min_codepoint=33, exclude_characters="'\"", exclude_categories=["C", "Z"]), min_size=1))
def test_no_password_gets_through_whatever_it_is_made_of(password: str) -> None:
    secret = f"<{password}>"
    assert secret not in hide_address_secrets(f"cannot read https://me:{secret}@host/path")
