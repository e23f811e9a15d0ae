"""Writes tests/sample: a few self-written sentences in XNLI's file layout, and a small SentencePiece model.

    python tests/make_sample.py

With it the tests run offline, through the same reader as the real data. It is far too small to learn a language from.

SCENES: two for each language, each a premise and its entailed, neutral and contradicting hypothesis.
"""

import itertools
import os
import random

import sentencepiece

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample")
LABELS = ("entailment", "neutral", "contradiction")

SCENES = (
    ("ar", "تقرأ البنت كتابا أحمر في الحديقة.", "البنت تقرأ كتابا.", "البنت تنتظر أمها.", "البنت لا تقرأ."),
    ("ar", "اشترى الرجل خمس تفاحات من السوق.", "اشترى الرجل تفاحا.", "الرجل جائع.", "لم يشتر الرجل شيئا."),
    ("bg", "Момичето чете червена книга в градината.", "Момичето чете книга.", "Момичето чака майка си.", "Момичето не чете."),
    ("bg", "Мъжът купи пет ябълки от пазара.", "Мъжът купи ябълки.", "Мъжът е гладен.", "Мъжът не купи нищо."),
    ("de", "Das Mädchen liest ein rotes Buch im Garten.", "Das Mädchen liest ein Buch.", "Das Mädchen wartet auf seine Mutter.", "Das Mädchen liest nicht."),
    ("de", "Der Mann kaufte fünf Äpfel auf dem Markt.", "Der Mann kaufte Äpfel.", "Der Mann ist hungrig.", "Der Mann kaufte nichts."),
    ("el", "Το κορίτσι διαβάζει ένα κόκκινο βιβλίο στον κήπο.", "Το κορίτσι διαβάζει ένα βιβλίο.", "Το κορίτσι περιμένει τη μητέρα του.", "Το κορίτσι δεν διαβάζει."),
    ("el", "Ο άντρας αγόρασε πέντε μήλα από την αγορά.", "Ο άντρας αγόρασε μήλα.", "Ο άντρας πεινάει.", "Ο άντρας δεν αγόρασε τίποτα."),
    ("en", "The girl reads a red book in the garden.", "The girl reads a book.", "The girl waits for her mother.", "The girl does not read."),
    ("en", "The man bought five apples at the market.", "The man bought apples.", "The man is hungry.", "The man bought nothing."),
    ("es", "La niña lee un libro rojo en el jardín.", "La niña lee un libro.", "La niña espera a su madre.", "La niña no lee."),
    ("es", "El hombre compró cinco manzanas en el mercado.", "El hombre compró manzanas.", "El hombre tiene hambre.", "El hombre no compró nada."),
    ("fr", "La fille lit un livre rouge dans le jardin.", "La fille lit un livre.", "La fille attend sa mère.", "La fille ne lit pas."),
    ("fr", "L'homme a acheté cinq pommes au marché.", "L'homme a acheté des pommes.", "L'homme a faim.", "L'homme n'a rien acheté."),
    ("hi", "लड़की बगीचे में लाल किताब पढ़ती है।", "लड़की किताब पढ़ती है।", "लड़की अपनी माँ की प्रतीक्षा करती है।", "लड़की नहीं पढ़ती है।"),
    ("hi", "आदमी ने बाज़ार से पाँच सेब खरीदे।", "आदमी ने सेब खरीदे।", "आदमी भूखा है।", "आदमी ने कुछ नहीं खरीदा।"),
    ("ru", "Девочка читает красную книгу в саду.", "Девочка читает книгу.", "Девочка ждёт маму.", "Девочка не читает."),
    ("ru", "Мужчина купил пять яблок на рынке.", "Мужчина купил яблоки.", "Мужчина голоден.", "Мужчина ничего не купил."),
    ("sw", "Msichana anasoma kitabu chekundu bustanini.", "Msichana anasoma kitabu.", "Msichana anamsubiri mama yake.", "Msichana hasomi."),
    ("sw", "Mwanamume alinunua matofaa matano sokoni.", "Mwanamume alinunua matofaa.", "Mwanamume ana njaa.", "Mwanamume hakununua kitu."),
    ("th", "เด็กผู้หญิงอ่านหนังสือสีแดงในสวน", "เด็กผู้หญิงอ่านหนังสือ", "เด็กผู้หญิงรอแม่", "เด็กผู้หญิงไม่อ่านหนังสือ"),
    ("th", "ผู้ชายซื้อแอปเปิลห้าลูกที่ตลาด", "ผู้ชายซื้อแอปเปิล", "ผู้ชายหิว", "ผู้ชายไม่ได้ซื้ออะไร"),
    ("tr", "Kız bahçede kırmızı bir kitap okuyor.", "Kız bir kitap okuyor.", "Kız annesini bekliyor.", "Kız okumuyor."),
    ("tr", "Adam pazardan beş elma aldı.", "Adam elma aldı.", "Adam aç.", "Adam hiçbir şey almadı."),
    ("ur", "لڑکی باغ میں سرخ کتاب پڑھتی ہے۔", "لڑکی کتاب پڑھتی ہے۔", "لڑکی اپنی ماں کا انتظار کرتی ہے۔", "لڑکی نہیں پڑھتی۔"),
    ("ur", "آدمی نے بازار سے پانچ سیب خریدے۔", "آدمی نے سیب خریدے۔", "آدمی بھوکا ہے۔", "آدمی نے کچھ نہیں خریدا۔"),
    ("vi", "Cô bé đọc một cuốn sách đỏ trong vườn.", "Cô bé đọc sách.", "Cô bé đợi mẹ.", "Cô bé không đọc sách."),
    ("vi", "Người đàn ông mua năm quả táo ở chợ.", "Người đàn ông mua táo.", "Người đàn ông đói.", "Người đàn ông không mua gì."),
    ("zh", "女孩在花园里读一本红色的书。", "女孩在读书。", "女孩在等她的妈妈。", "女孩没有读书。"),
    ("zh", "男人在市场买了五个苹果。", "男人买了苹果。", "男人饿了。", "男人什么也没买。"),
)  # fmt: skip

WHO = ("The girl", "The boy", "The teacher", "A farmer", "My neighbour")
WHAT = (("reads", "read", "a book"), ("paints", "paint", "a picture"), ("sells", "sell", "a table"))
WHERE = ("in the garden", "at home", "near the river", "in the old town")


def training_rows() -> list[tuple[str, str, str]]:
    """60 English premises with three hypotheses each."""
    rows = []
    for who, (verb, plain, thing), where in itertools.product(WHO, WHAT, WHERE):
        premise = f"{who} {verb} {thing} {where} ."
        rows.append((premise, f"{who} {verb} {thing} .", "entailment"))
        rows.append((premise, f"{who} {verb} {thing} {where} every day .", "neutral"))
        rows.append((premise, f"{who} does not {plain} {thing} .", "contradictory"))
    random.Random(0).shuffle(rows)
    return rows


def write_tsv(path: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in [header, *rows]:
            file.write("\t".join(row) + "\n")


def main() -> None:
    rows = training_rows()
    train = os.path.join(HERE, "XNLI-MT-1.0", "multinli", "multinli.train.en.tsv")
    write_tsv(train, ("premise", "hypo", "label"), rows)
    header = ("language", "gold_label", "sentence1", "sentence2", "promptID")
    for number, split in enumerate(("dev", "test")):
        found = []
        for language, premise, *hypotheses in SCENES[number::2]:
            for label, hypothesis in zip(LABELS, hypotheses, strict=True):
                found.append((language, label, premise, hypothesis, str(number + 1)))
        write_tsv(os.path.join(HERE, "XNLI-1.0", f"xnli.{split}.tsv"), header, found)
    text = [sentence for _, *sentences in SCENES for sentence in sentences]
    text += [s for premise, hypothesis, _ in rows for s in (premise, hypothesis)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=os.path.relpath(os.path.join(HERE, "sentencepiece.bpe")),  # it is written into the file
        vocab_size=440,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",  # as XLM-R's
        minloglevel=2,
    )
    os.unlink(os.path.join(HERE, "sentencepiece.bpe.vocab"))


if __name__ == "__main__":
    main()
