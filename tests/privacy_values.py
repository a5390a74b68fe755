"""Values of personal data made up by the published rules of their numbers: the truth of the tests of de-identification. Imports nothing of the project.

Every maker takes a `random.Random` and gives a text. Check digits are computed here by the rules as the authorities state them.
"""
from datetime import date, timedelta
from random import Random

KO_FAMILY = ["김"] * 10 + ["이"] * 7 + ["박"] * 4 + ["최"] * 2 + ["정"] * 2 + "강 조 윤 장 임 한 오 서 신 권 황 안 송 류 전 홍 고 문 양 손 배 백 허 유 남 심 노 하 곽 성 차 주 우 구 민 진 나 지 엄 채 원 천 방 공 현 함 변 염 여 추 도 소 석 선 설 마 길".split() + ["남궁", "황보", "선우", "제갈"]
KO_GIVEN = ("민준 서준 도윤 예준 시우 하준 지호 주원 지후 준우 준서 건우 도현 현우 우진 선우 지훈 유준 서진 연우 은우 민재 이준 시윤 정우 승우 지우 승현 준혁 지환 윤우 승민 유찬 지원 민성 수호 재윤 한결 시후 진우 "
            "서연 서윤 지우 서현 하은 하윤 민서 지유 윤서 채원 수아 지민 지아 지윤 다은 은서 예은 수빈 소율 예린 지안 소윤 예원 유나 시은 채은 유진 윤아 예나 가은 서영 나은 아린 다인 수민 연서 주아 서아 하린 예서 "
            "영수 영호 영식 성수 정훈 성호 상훈 동현 성민 재현 상현 태현 종현 철수 광수 병철 기철 만수 춘식 덕수 용식 경호 태식 창수 순자 영희 미경 은주 경숙 정희 현숙 미숙 영숙 옥순 말순 춘자 명자 정자 복순 은정 지영 미영 수진 혜진 은영 "
            "보람 아름 슬기 한솔 가람 다솜 우람 빛나 나래 초롱").split()
KO_SHORT = "솔 건 준 현 훈 찬 윤 린".split()
EN_GIVEN = ("Aaron Abigail Adrian Alison Amber Andrew Angela Barry Beatrice Benjamin Bethany Bradley Bridget Callum Carmen Caroline Cecilia Charles Chloe Claudia Damian Daniel Deborah Derek Diana Dominic Edward Eleanor Elliot Emily Erica "
            "Felicity Fergus Frances Gabriel Gemma George Gillian Gordon Graham Hannah Harriet Harvey Heather Helen Henry Hugo Imogen Isaac Isabel Jacob Jane Janet Jason Jeremy Jessica Joan Jonathan Joseph Julia Karen Katherine Keith Kevin "
            "Laura Leonard Lewis Linda Louise Lucas Lydia Marcus Margaret Martin Matilda Maurice Melissa Michael Miriam Mohammed Monica Nadia Natalie Nathan Nicole Nigel Noel Olga Oliver Pamela Patricia Paul Peter Philip Priya Rachel Raymond "
            "Rebecca Richard Robert Roland Rosa Ruth Samuel Sandra Sean Sharon Simon Sophia Stella Stephen Susan Sylvia Teresa Thomas Timothy Tobias Tracy Valerie Vanessa Victor Violet Walter Wendy William Yvonne Zachary Zoe").split()
EN_FAMILY = ("Abbott Ackerman Bailey Barlow Bennett Blackwood Bramley Burton Caldwell Carmichael Chapman Crawford Cunningham Dalton Delgado Donovan Eastwood Ellison Farrell Ferguson Fitzgerald Fletcher Gallagher Goldberg Grantham Gutierrez Hadley "
             "Hargreaves Henderson Holloway Ibrahim Jankowski Jefferies Kapoor Kaufman Kowalski Lancaster Langley Lindqvist Lockwood MacDonald Marchetti McAllister McCarthy Merriweather Montague Nakamura Nguyen O'Connor O'Neill Okafor Osborne Patel "
             "Pemberton Pritchard Quinn Radcliffe Ramirez Rutherford Schneider Shepherd Sinclair Stanfield Stephenson Sutherland Tanaka Thackeray Underhill Vasquez Wainwright Weatherby Whitfield Winterbourne Yamamoto Zimmerman").split()
CITIES = {  # a few of each, with real districts, roads and quarters
    "서울특별시": {"강남구": (["테헤란로", "역삼로", "봉은사로", "논현로85길"], ["역삼동", "삼성동", "대치동"]), "마포구": (["월드컵북로", "양화로", "독막로"], ["서교동", "상암동", "망원동"]), "종로구": (["세종대로", "율곡로", "자하문로"], ["청운동", "사직동", "혜화동"])},
    "부산광역시": {"해운대구": (["센텀중앙로", "해운대로", "마린시티2로"], ["우동", "중동", "좌동"]), "부산진구": (["중앙대로", "가야대로"], ["부전동", "전포동", "개금동"])},
    "대전광역시": {"유성구": (["대학로", "엑스포로", "테크노중앙로"], ["봉명동", "궁동", "관평동"])},
    "경기도": {"성남시 분당구": (["판교역로", "불정로", "황새울로"], ["정자동", "서현동", "삼평동"]), "수원시 영통구": (["광교중앙로", "덕영대로"], ["원천동", "매탄동"]), "파주시 교하읍": (["교하로", "숲속노을로"], ["동패리", "야당리"])},
    "강원특별자치도": {"춘천시": (["공지로", "후석로"], ["효자동", "퇴계동"]), "평창군 대관령면": (["올림픽로", "솔봉로"], ["횡계리", "용산리"])},
    "전라남도": {"여수시": (["여문로", "시청로"], ["학동", "문수동"]), "해남군 삼산면": (["고산로"], ["구림리", "평활리"])},
    "경상북도": {"포항시 북구": (["새천년대로", "중앙로"], ["장성동", "양덕동"]), "안동시": (["경동로", "퇴계로"], ["옥동", "정하동"])},
    "제주특별자치도": {"제주시": (["연북로", "노형로"], ["노형동", "연동"]), "서귀포시": (["중문로", "김정문화로"], ["중문동", "강정동"])},
}
BUILDINGS = ["한빛아파트", "푸른마을", "대우드림타운", "삼호빌라", "현대오피스텔", "그린빌", "래미안퍼스티지", "은하수맨션", "더샵센트럴", "동성빌딩"]
BANKS = ["국민은행", "신한은행", "우리은행", "하나은행", "농협", "기업은행", "카카오뱅크", "새마을금고", "우체국", "대구은행"]


def digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _born(rng: Random, first: date, last: date) -> date:
    return first + timedelta(days=rng.randrange((last - first).days))


def _check(body: str, base: int) -> str:
    return str((base - sum(int(c) * w for c, w in zip(body, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=True)) % 11) % 10)


def rrn(rng: Random) -> str:
    if rng.random() < 0.25:  # given since October 2020: no check digit
        born = _born(rng, date(2020, 10, 5), date(2025, 6, 1))
        return f"{born:%y%m%d}-{rng.choice('34')}{digits(rng, 6)}"
    born = _born(rng, date(1935, 1, 1), date(2019, 12, 31))
    body = f"{born:%y%m%d}{rng.choice('12' if born.year < 2000 else '34')}{digits(rng, 5)}"
    whole = body + _check(body, 11)
    return whole if rng.random() < 0.2 else f"{whole[:6]}-{whole[6:]}"


def frn(rng: Random) -> str:
    born = _born(rng, date(1950, 1, 1), date(2015, 12, 31))
    body = f"{born:%y%m%d}{rng.choice('56' if born.year < 2000 else '78')}{digits(rng, 5)}"
    return f"{body[:6]}-{body[6:]}{_check(body, 13)}"


def passport_ko(rng: Random) -> str:
    return rng.choice("MSRDO") + digits(rng, 8) if rng.random() < 0.5 else f"M{digits(rng, 3)}{rng.choice('ABCDEFGHJKLNP')}{digits(rng, 4)}"


def driver_ko(rng: Random) -> str:
    head = rng.choice([str(rng.randrange(11, 29)), rng.choice(["서울", "부산", "경기", "강원"])]) if rng.random() < 0.5 else str(rng.randrange(11, 29))
    return f"{head}-{rng.randrange(70, 100):02d}-{digits(rng, 6)}-{digits(rng, 2)}"


def business(rng: Random) -> str:
    body = f"{rng.randrange(101, 899)}{rng.randrange(1, 99):02d}{digits(rng, 4)}"
    total = sum(int(c) * w for c, w in zip(body, (1, 3, 7, 1, 3, 7, 1, 3, 5), strict=True)) + int(body[8]) * 5 // 10
    whole = body + str((10 - total % 10) % 10)
    return f"{whole[:3]}-{whole[3:5]}-{whole[5:]}"


def corporate(rng: Random) -> str:
    body = f"{rng.choice(['1101', '1801', '1201', '1346'])}{rng.choice(['11', '21', '14'])}{digits(rng, 6)}"
    check = (10 - sum(int(c) * (1, 2)[i % 2] for i, c in enumerate(body)) % 10) % 10
    return f"{body[:6]}-{body[6:]}{check}"


def phone_ko(rng: Random) -> str:
    middle, last = str(rng.randrange(2000, 9999)), digits(rng, 4)
    area = rng.choice(["02", "031", "032", "033", "041", "042", "051", "052", "053", "054", "061", "062", "063", "064", "070"])
    short = rng.choice([str(rng.randrange(200, 999)), middle]) if area != "070" else middle
    return rng.choice([
        f"010-{middle}-{last}", f"010-{middle}-{last}", f"010.{middle}.{last}", f"010 {middle} {last}", f"010{middle}{last}", f"+82-10-{middle}-{last}", f"+82 10 {middle} {last}", f"(010) {middle}-{last}",
        f"010-{middle}{last}", f"011-{rng.randrange(200, 999)}-{last}", f"{area}-{short}-{last}", f"{area}-{short}-{last}", f"({area}) {short}-{last}", f"{area}){short}-{last}", f"+82-{area[1:]}-{short}-{last}", f"010/{middle}/{last}"])


def spelt_phone(rng: Random) -> str:
    names = "공일이삼사오육칠팔구"
    number = ["010", str(rng.randrange(2000, 9999)), digits(rng, 4)]
    parts = ["".join(names[int(c)] for c in part) for part in number]
    return rng.choice([" ", "-", ""]).join(parts)


def account_ko(rng: Random) -> str:
    return rng.choice([f"{digits(rng, 6)}-{digits(rng, 2)}-{digits(rng, 6)}", f"{digits(rng, 3)}-{digits(rng, 3)}-{digits(rng, 6)}", f"{digits(rng, 4)}-{digits(rng, 3)}-{digits(rng, 6)}",
                       f"3333-{digits(rng, 2)}-{digits(rng, 7)}", "1" + digits(rng, 12), f"{digits(rng, 3)}-{digits(rng, 4)}-{digits(rng, 4)}-{digits(rng, 2)}"])


def card(rng: Random) -> str:
    body = rng.choice(["4", "51", "55", "9410", "6243", "3528"])
    body += digits(rng, 15 - len(body))
    total = sum(d if i % 2 else (d * 2 - 9 if d > 4 else d * 2) for i, d in enumerate(map(int, body)))
    whole = body + str(-total % 10)
    return rng.choice(["-", "-", " ", ""]).join(whole[i:i + 4] for i in range(0, 16, 4))


def plate(rng: Random) -> str:
    use = rng.choice("가나다라마거너더러머버서어저고노도로모보소오조구누두루무부수우주바사아자하허호배")
    return rng.choice([f"{rng.randrange(10, 99)}{use} {digits(rng, 4)}", f"{rng.randrange(100, 699)}{use}{digits(rng, 4)}", f"{rng.randrange(100, 699)}{use} {digits(rng, 4)}", f"서울 {rng.randrange(10, 99)}{use} {digits(rng, 4)}"])


def ip(rng: Random) -> str:
    if rng.random() < 0.25:
        return "2001:db8:" + ":".join(f"{rng.randrange(1, 65535):x}" for _ in range(6))
    return f"{rng.choice([10, 121, 172, 192, 203, 211, 218])}.{rng.randrange(13, 255)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"


def mail(rng: Random) -> str:
    user = rng.choice(["hong", "minsu", "sales", "j.park", "kim_yh", "a.b.c", "contact", "lee-87", "tester"]) + rng.choice(["", digits(rng, 2), digits(rng, 4)])
    return f"{user}@{rng.choice(['naver.com', 'gmail.com', 'moe.go.kr', 'snu.ac.kr', 'example.co.uk', 'mail.city.org', 'hanmail.net', 'company.io'])}"


def name_ko(rng: Random) -> str:
    family = rng.choice(KO_FAMILY)
    return family + rng.choice(KO_GIVEN if rng.random() < 0.94 else KO_SHORT)


def address_ko(rng: Random) -> str:
    city = rng.choice(list(CITIES))
    district = rng.choice(list(CITIES[city]))
    roads, quarters = CITIES[city][district]
    short = {"서울특별시": "서울", "부산광역시": "부산", "경기도": "경기", "전라남도": "전남", "경상북도": "경북", "대전광역시": "대전시"}
    head = f"{rng.choice([city, city, short.get(city, city)])} {district}"
    detail = rng.choice(["", "", f", {rng.randrange(1, 20)}층", f", {rng.randrange(101, 120)}동 {rng.randrange(101, 1999)}호", f" {rng.choice(BUILDINGS)} {rng.randrange(101, 110)}동 {rng.randrange(101, 1999)}호"])
    if rng.random() < 0.6:
        branch = f" {rng.randrange(2, 90)}번길" if rng.random() < 0.25 else ""
        house = f"{rng.randrange(1, 600)}" + (f"-{rng.randrange(1, 40)}" if rng.random() < 0.3 else "")
        quarter = f" ({rng.choice(quarters)})" if rng.random() < 0.3 else ""
        return f"{head} {rng.choice(roads)}{branch} {house}{detail}{quarter}"
    lot = f"{rng.randrange(1, 1200)}-{rng.randrange(1, 90)}" + rng.choice(["", "번지"])
    return f"{head} {rng.choice(quarters)} {rng.choice(['', '', '산 '])}{lot}{detail.replace(',', '')}"


def name_en(rng: Random) -> str:
    middle = f" {rng.choice('ABCDEFGHJKLMNPRSTW')}." if rng.random() < 0.15 else ""
    return f"{rng.choice(EN_GIVEN)}{middle} {rng.choice(EN_FAMILY)}"


def address_en(rng: Random) -> str:
    street = f"{rng.choice(['Maple', 'Oakwood', 'Cedar', 'Elm', 'Washington', 'Lincoln', 'Park', 'Sunset', 'Willow Creek', 'High', 'Victoria', 'Church', 'Mill', 'Station'])} {rng.choice(['Street', 'St.', 'Avenue', 'Ave', 'Road', 'Rd', 'Lane', 'Drive', 'Blvd', 'Court'])}"
    if rng.random() < 0.6:
        town = rng.choice(["Springfield, IL", "Portland, OR", "Austin, TX", "Boston, MA", "Denver, CO", "San Diego, California", "Salt Lake City, UT"])
        return f"{rng.randrange(1, 9999)} {street}{rng.choice(['', ', Apt ' + str(rng.randrange(1, 40)), ', Suite ' + str(rng.randrange(100, 900))])}, {town} {digits(rng, 5)}"
    code = f"{rng.choice(['OX1', 'SW1A', 'M1', 'LS6', 'EH8', 'B15', 'CF10'])} {rng.randrange(1, 9)}{rng.choice(['AB', 'QT', 'LD', 'HJ'])}"
    return f"{rng.choice(['', 'Flat ' + str(rng.randrange(1, 30)) + ', '])}{rng.randrange(1, 250)} {street}, {rng.choice(['Oxford', 'London', 'Manchester', 'Leeds', 'Edinburgh', 'Birmingham', 'Cardiff'])} {code}"


def phone_us(rng: Random) -> str:
    a, b, c = f"{rng.randrange(2, 10)}{rng.choice('02345678')}{rng.choice('23456789')}", f"{rng.randrange(2, 10)}{rng.choice('02345678')}{rng.choice('23456789')}", digits(rng, 4)
    return rng.choice([f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"{a}.{b}.{c}", f"+1 {a} {b} {c}", f"+1-{a}-{b}-{c}", f"1-{a}-{b}-{c}"])


def phone_uk(rng: Random) -> str:
    return rng.choice([f"+44 7{digits(rng, 3)} {digits(rng, 6)}", f"07{rng.choice('4578')}{digits(rng, 2)} {digits(rng, 6)}", f"020 7{digits(rng, 3)} {digits(rng, 4)}", f"0161 {digits(rng, 3)} {digits(rng, 4)}", f"+44 20 7{digits(rng, 3)} {digits(rng, 4)}"])


def ssn(rng: Random) -> str:
    return f"{rng.randrange(1, 665):03d}-{rng.randrange(1, 99):02d}-{rng.randrange(1, 9999):04d}"


def nino(rng: Random) -> str:
    return rng.choice([" ", ""]).join([rng.choice(["AB", "CE", "JK", "PW", "SN", "YZ"]), digits(rng, 2), digits(rng, 2), digits(rng, 2), rng.choice("ABCD")])


def nhs(rng: Random) -> str:
    while True:
        body = digits(rng, 9)
        check = 11 - sum(int(c) * (10 - i) for i, c in enumerate(body)) % 11
        if check != 10:
            whole = body + str(check % 11)
            return f"{whole[:3]} {whole[3:6]} {whole[6:]}"


def iban(rng: Random) -> str:
    country, body = rng.choice([("GB", "WEST" + digits(rng, 14)), ("DE", digits(rng, 18)), ("FR", digits(rng, 23))])
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    whole = f"{country}{98 - number % 97:02d}{body}"
    return " ".join(whole[i:i + 4] for i in range(0, len(whole), 4)) if rng.random() < 0.5 else whole
