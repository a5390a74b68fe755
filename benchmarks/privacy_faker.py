"""Values that others make (Faker: ko_KR, en_US, en_GB), in sentences of a few kinds: how many are found. For bench_curate_privacy.py.

Faker shares nothing with the recognisers nor with the labelled set, but is no truth either: its Korean addresses join cities and streets at random, its
English streets end in words that no street has (Junctions, Ferry), and its numbers are not always of the plan.
"""
from collections.abc import Callable, Iterator

Find = Callable[[str], list[tuple[int, int, str]]]

# what: (locale, method, sentences with {})
SETS = {
    "Korean names behind a label": ("ko_KR", "name", ("성명: {}", "신청인 {}의 주소", "담당자: {} (총무과)", "예금주 {}", "이름은 {}입니다.")),
    "Korean names before a title": ("ko_KR", "name", ("어제 {} 씨가 왔다.", "{} 과장은 출장 중이다.", "{} 의원이 질의하였다.", "{} 선생님께 배웠다.")),
    "Korean names in rows": ("ko_KR", "name", ("{} | 010-2345-6789 | 서울", "1,{},01023456789", "{}\t02-2345-6789\t총무과")),
    "Korean names without a cue": ("ko_KR", "name", ("{}이 학교를 그만두었다.", "어제 {}를 만났다.", "{}에게 책을 주었다.", "그 일은 {}의 것이다.", "오늘 {}과 밥을 먹었다.")),
    "Korean addresses by road": ("ko_KR", "road_address", ("주소: {}", "{}에 산다.", "배송지는 {}입니다.")),
    "Korean addresses by lot": ("ko_KR", "land_address", ("주소: {}", "{}에 산다.", "배송지는 {}입니다.")),
    "Korean phones": ("ko_KR", "phone_number", ("전화 {}", "{}로 주세요", "문의({})")),
    "resident numbers": ("ko_KR", "ssn", ("주민등록번호 {}", "{}인 사람", "번호는 {}이다.")),
    "English names behind a label": ("en_US", "name_nonbinary", ("Name: {}", "Patient: {}", "Dear {},", "My name is {}.")),
    "English names in a sentence": ("en_US", "name_nonbinary", ("{} signed the lease.", "We met with {} on Monday.", "The letter from {} was late.", "I asked {} to wait.")),
    "US addresses": ("en_US", "address", ("I live at {}.", "Send it to {}, please.", "Address: {}")),
    "US streets alone": ("en_US", "street_address", ("I live at {}.", "He moved to {} last year.", "Address: {}")),
    "UK addresses": ("en_GB", "address", ("I live at {}.", "Send it to {}, please.", "Address: {}")),
    "UK streets alone": ("en_GB", "street_address", ("I live at {}.", "He moved to {} last year.", "Address: {}")),
    "US phones": ("en_US", "phone_number", ("Call {}.", "My number is {}", "({})")),
    "UK phones": ("en_GB", "phone_number", ("Call {}.", "My number is {}", "({})")),
    "mail": ("en_US", "email", ("{}로 보내 주세요", "Write to {}.", "<{}>")),
    "IPv4": ("en_US", "ipv4_public", ("접속 IP {}", "from {} at noon", "host={}")),
    "IPv6": ("en_US", "ipv6", ("접속 IP {}", "from {} at noon", "host={}")),
    "SSN": ("en_US", "ssn", ("SSN {}", "Her number is {}.", "SSN: {}")),
    "IBAN": ("en_GB", "iban", ("IBAN {}", "Pay to {} now.", "계좌 {}")),
    "cards": ("en_US", "credit_card_number", ("카드번호 {}", "Visa {}", "card number: {}")),
    "UK plates": ("en_GB", "license_plate", ("vehicle {}", "The car {} was towed.")),
}


def results(find: Find, each: int = 200) -> Iterator[tuple[str, float]]:
    """(what, share of values of which every letter and digit was found). Raises ImportError without Faker."""
    from faker import Faker

    for what, (locale, method, sentences) in SETS.items():
        Faker.seed(20261129)
        make, found = Faker(locale), 0
        for number in range(each):
            value, sentence = str(getattr(make, method)()), sentences[number % len(sentences)]
            at = sentence.index("{}")
            places = {place for start, end, _ in find(sentence.replace("{}", value)) for place in range(start, end)}
            found += all(place + at in places for place, character in enumerate(value) if character.isalnum())
        yield what, found / each
