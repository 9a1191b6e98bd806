"""Detect PII in text: e-mail and IP addresses, phone numbers, credit card numbers and IBANs.

Numbers with a checksum must pass it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from llmworks.guard import SensitiveSpan

EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9](?:[\w.+%-]|'(?=\w)){0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+([A-Za-z]{2,24})"
    r"(?![\w@-])"
)
# file extensions and systemd unit suffixes that look like a top-level domain but are not
NO_DOMAIN = frozenset(
    [
        "png",
        "jpg",
        "jpeg",
        "gif",
        "webp",
        "svg",
        "service",
        "socket",
        "timer",
        "localdomain",
        "localhost",
        "py",
        "js",
        "ts",
        "css",
        "html",
        "json",
        "yaml",
        "md",
        "txt",
    ]
)
IPV4 = re.compile(r"(?<![\w.-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w-]|\.\d)")
IPV6 = re.compile(
    r"(?:(?<![\w:.])|(?<=ip6:))(?=[0-9A-Fa-f:]*:[0-9A-Fa-f]*:)[0-9A-Fa-f:]{2,39}(?:\.\d{1,3}){0,3}(?![\w:])"
)
CARD = re.compile(
    r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d]|[.-]\d)|(?<![\d.-])3[47]\d{2}[ -]?\d{6}["
    r" -]?\d{5}(?![\d]|[.-]\d)"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
PHONE = re.compile(
    r"(?<![\w+/#-])(?<!\d\.)(?<!\d )(?:"
    r"(?:\+|00 ?)[1-9]\d{0,2}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:(?:[ .-]| ?/ ?)?\d{2,4}){1,5}"  # international
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"  # North America
    r"|0[1-9](?:[ .-]\d{2}){4}"  # pairs, as in France
    r"|\(?0[1-9]\d{1,4}\)?(?:(?:[ -]| ?/ ?)\d{2,8}){1,4}"  # national, with the trunk zero
    r")(?:(?:,? ?(?:ext\.?|x) ?)\d{1,5})?(?![\w]|[.-]\d|/\d)"
)
VERSION = re.compile(r"(?:\bv|[Vv]ersion|[Rr]elease|[Ff]irmware|[A-Za-z]/)[\s=:\"'v]*$")
# IBAN length by country (ISO 13616 registry)
IBAN_LENGTHS = {
    "AD": 24,
    "AE": 23,
    "AL": 28,
    "AT": 20,
    "AZ": 28,
    "BA": 20,
    "BE": 16,
    "BG": 22,
    "BH": 22,
    "BR": 29,
    "BY": 28,
    "CH": 21,
    "CR": 22,
    "CY": 28,
    "CZ": 24,
    "DE": 22,
    "DK": 18,
    "DO": 28,
    "EE": 20,
    "EG": 29,
    "ES": 24,
    "FI": 18,
    "FO": 18,
    "FR": 27,
    "GB": 22,
    "GE": 22,
    "GI": 23,
    "GL": 18,
    "GR": 27,
    "GT": 28,
    "HR": 21,
    "HU": 28,
    "IE": 22,
    "IL": 23,
    "IQ": 23,
    "IS": 26,
    "IT": 27,
    "JO": 30,
    "KW": 30,
    "KZ": 20,
    "LB": 28,
    "LC": 32,
    "LI": 21,
    "LT": 20,
    "LU": 20,
    "LV": 21,
    "MC": 27,
    "MD": 24,
    "ME": 22,
    "MK": 19,
    "MR": 27,
    "MT": 31,
    "MU": 30,
    "NL": 18,
    "NO": 15,
    "PK": 24,
    "PL": 28,
    "PS": 29,
    "PT": 25,
    "QA": 29,
    "RO": 24,
    "RS": 22,
    "SA": 24,
    "SC": 31,
    "SE": 24,
    "SI": 19,
    "SK": 24,
    "SM": 27,
    "ST": 25,
    "SV": 28,
    "TL": 23,
    "TN": 24,
    "TR": 26,
    "UA": 29,
    "VA": 22,
    "VG": 24,
    "XK": 20,
}
# card brands: first digits and lengths (ISO/IEC 7812)
BRANDS = (
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6011|65|64[4-9]"), (16, 19)),
    (re.compile(r"35(?:2[89]|[3-8])"), (16,)),
    (re.compile(r"62"), (16, 17, 18, 19)),
)
EXAMPLE_DOMAIN = re.compile(
    r"@(?:.*\.)?(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)$", re.IGNORECASE
)  # RFC 2606
# fast pre-filters
DOTTED, COLONS, DIGITS = (
    re.compile(r"\d\.\d{1,3}\.\d"),
    re.compile(r"[0-9A-Fa-f]:[0-9A-Fa-f:]*:|::[0-9A-Fa-f]"),
    re.compile(r"\d{4}[ -]?\d{4}"),
)
NO_NUMBER = re.compile(r"\+\d\.\d+$|0\d{4}-\d{4}$|\+\d+\.\d+[+-]\d+\.\d+$")  # decimals, postal codes, coordinates
DATE = re.compile(r"\d{4}[-./ ]\d{2}[-./ ]\d{2}|\d{2}[-./ ]\d{2}[-./ ]\d{4}")


def is_luhn_valid(digits: str) -> bool:
    """Check the Luhn check digit (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_valid_iban(number: str) -> bool:
    """Check the length and check digits of an IBAN (ISO 7064, MOD 97-10)."""
    if IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def find_emails(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find e-mail addresses; those of reserved example domains only with `include_reserved`."""
    if "@" in text:
        for match in EMAIL.finditer(text):
            if (
                ".." not in match.group()
                and match.group(1).lower() not in NO_DOMAIN
                and (include_reserved or not EXAMPLE_DOMAIN.search(match.group()))
            ):
                yield _make_span("email", match)


def find_ip_addresses(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find public IP addresses; private, local and documentation ranges only with `include_reserved`."""
    for pattern, sign in ((IPV4, DOTTED), (IPV6, COLONS)):
        if not sign.search(text):
            continue
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(
                    match.group().rstrip(":") if not match.group().endswith("::") else match.group()
                )
            except ValueError:
                continue
            if address.version == 4 and VERSION.search(text[max(0, match.start() - 20) : match.start()]):
                continue
            if address.version == 6 and not _is_address(match.group()):
                continue
            if include_reserved or (address.is_global and not address.is_multicast):
                yield _make_span("ip", match)


def _is_address(value: str) -> bool:
    """Return whether an IPv6 match is plausible: at least 6 hex digits, not an identifier without decimal digits, not a
    MAC address (pairs only).
    """
    groups = value.split(":")
    return (
        sum(c.isalnum() for c in value) >= 6
        and any(c.isdigit() for c in value)
        and not all(len(group) == 2 for group in groups)
    )


def find_cards(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find card numbers of known brands with a valid check digit."""
    for match in CARD.finditer(text) if DIGITS.search(text) else ():
        digits = re.sub(r"\D", "", match.group())
        if (
            len(set(digits)) > 2
            and any(first.match(digits) and len(digits) in lengths for first, lengths in BRANDS)
            and is_luhn_valid(digits)
        ):
            yield _make_span("card", match)


def find_ibans(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find IBANs with valid check digits."""
    for match in IBAN.finditer(text):
        words = match.group().split(" ")
        for end in range(len(words), 0, -1):  # an uppercase word may follow the number
            candidate = " ".join(words[:end])
            if is_valid_iban(candidate.replace(" ", "")):
                yield SensitiveSpan("iban", match.start(), match.start() + len(candidate), candidate)
                break


def find_phones(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find phone numbers written with a country code, or grouped as North American or national numbers."""
    for match in PHONE.finditer(text):
        number = re.split(r",? ?(?:ext|x)", match.group())[0]
        digits = re.sub(r"\D", "", number)
        least = 9 if digits[0] == "0" and not digits.startswith("00") else 7
        if not least <= len(digits) <= 15 or len(set(digits)) < 3 or DATE.fullmatch(number) or NO_NUMBER.match(number):
            continue
        if not include_reserved and re.search(r"555[ .-]?01\d\d$", number):
            continue
        yield _make_span("phone", match)


def _make_span(kind: str, match: re.Match[str]) -> SensitiveSpan:
    return SensitiveSpan(kind, match.start(), match.end(), match.group())


DETECTORS: dict[str, Callable[[str, bool], Iterator[SensitiveSpan]]] = {
    "email": find_emails,
    "ip": find_ip_addresses,
    "card": find_cards,
    "iban": find_ibans,
    "phone": find_phones,
}
