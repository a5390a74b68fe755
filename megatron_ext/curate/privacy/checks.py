"""Check digits and dates. Every function takes digits alone ("9001011234568") and answers whether they can be."""
from datetime import date

LATEST_BIRTH = 2035  # not of today: what is found must not depend on when one looks
_RRN = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
_BUSINESS = (1, 3, 7, 1, 3, 7, 1, 3, 5)
_WITHOUT_CHECK = date(2020, 10, 1)  # numbers given since then have six random digits at the end (Resident Registration Act, enforcement rules, article 2)


def birth(digits: str) -> date | None:
    """The date in the first seven digits of a resident's or foreigner's number, None where there is none such."""
    century = {"1": 1900, "2": 1900, "3": 2000, "4": 2000, "5": 1900, "6": 1900, "7": 2000, "8": 2000, "9": 1800, "0": 1800}[digits[6]]
    year = century + int(digits[:2])
    if not 1880 <= year <= LATEST_BIRTH:
        return None
    try:
        return date(year, int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return None


def is_foreign(digits: str) -> bool:
    return digits[6] in "5678"


def resident(digits: str) -> bool:
    """The check digit of a resident registration number, or of a foreigner's."""
    total = sum(int(digit) * weight for digit, weight in zip(digits, _RRN, strict=False))
    return int(digits[12]) == ((13 if is_foreign(digits) else 11) - total % 11) % 10


def may_lack_check(born: date) -> bool:
    return born >= _WITHOUT_CHECK


def business(digits: str) -> bool:
    """Ten digits of the National Tax Service."""
    total = sum(int(digit) * weight for digit, weight in zip(digits, _BUSINESS, strict=False)) + int(digits[8]) * 5 // 10
    return digits[:3] >= "101" and int(digits[9]) == -total % 10


def corporate(digits: str) -> bool:
    """Thirteen digits of the courts' register of companies."""
    total = sum(int(digit) * (1 + place % 2) for place, digit in enumerate(digits[:12]))
    return int(digits[12]) == -total % 10


def luhn(digits: str) -> bool:
    """ISO/IEC 7812."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def card_issuer(digits: str) -> bool:
    """Whether a card may begin so: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, and the numbers of Korea alone (9)."""
    first, length = int(digits[:4]), len(digits)
    if digits[:2] in ("34", "37"):
        return length == 15
    if digits[:2] in ("36", "38", "39") or digits[:3] in ("300", "301", "302", "303", "304", "305"):
        return length in (14, 16)
    if digits[0] == "4":
        return length in (13, 16, 19)
    if 5100 <= first < 5600 or 2221 <= first <= 2720:
        return length == 16
    if digits[0] == "9":
        return length == 16
    return 3528 <= first < 3590 and length == 16 or digits[0] == "6" and 16 <= length <= 19


def nhs(digits: str) -> bool:
    """Ten digits of the United Kingdom's health service, modulo 11."""
    total = sum(int(digit) * (10 - place) for place, digit in enumerate(digits[:9]))
    return (11 - total % 11) % 11 == int(digits[9])


def routing(digits: str) -> bool:
    """Nine digits of a bank in the United States (ABA)."""
    return digits != "0" * 9 and sum(int(digit) * (3, 7, 1)[place % 3] for place, digit in enumerate(digits)) % 10 == 0


def iban(value: str) -> bool:
    """Capital letters and digits, ISO 13616, modulo 97."""
    turned = value[4:] + value[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def social_security(digits: str) -> bool:
    """Nine digits that the Social Security Administration gives, or the tax service in its place (9xx-50 and above)."""
    area, group = digits[:3], digits[3:5]
    if area in ("000", "666") or group == "00" or digits[5:] == "0000" or len(set(digits)) == 1 or digits == "123456789":
        return False
    return area[0] != "9" or "50" <= group
