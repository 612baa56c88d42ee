"""Tiny files in the format of each task's release, written for these tests, and the rows that they hold."""

from __future__ import annotations

import json
from pathlib import Path

MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
)
MNLI = "0\t7\t7c\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\t{0}\t{1}\tneutral\t{2}\t{2}\t{2}\t{2}\t{2}\n"

STSB = """\
index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore
0\tnews\tf\t2012\t1\tnone\tnone\tA boat.\tA ship.\t3.667
1\tnews\tf\t2012\t2\tnone\tnone\tA boat.\tAn egg.\t0.000
"""

# The second question is torn in two.
QQP = """\
id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate
5\t1\t2\tHow?\tWhy?\t0
6\t3\t4\tIs tea
hot?\tIs hot tea?\t1
7\t5\t6\tWhat is jam?\tWhat's jam?\t1
"""

COPA = """\
{"premise": "It fell.", "choice1": "It broke.", "choice2": "It sang.", "question": "effect", "label": 0, "idx": 0}
{"premise": "It fell.", "choice1": "It sang.", "choice2": "I let go.", "question": "cause", "label": 1, "idx": 1}
"""

MULTIRC_PARAGRAPH = "<b>Sent 1: </b>Rain fell.<br><b>Sent 2: </b>Mia < Tom stayed.<br>"
MULTIRC_PLAIN = "Sent 1: Rain fell. Sent 2: Mia < Tom stayed. "
MULTIRC = {
    "passage": {
        "text": MULTIRC_PARAGRAPH,
        "questions": [
            {
                "question": "Who stayed?",
                "answers": [{"text": "Mia", "idx": 40, "label": 1}, {"text": "the {rain}", "idx": 41, "label": 0}],
                "idx": 8,
            },
            {"question": "What fell?", "answers": [{"text": "Rain", "idx": 42, "label": 1}], "idx": 9},
        ],
    },
    "idx": 3,
    "version": 1.1,
}

RECORD_PASSAGE = 'Ada met "Bo" in Łódź\n@highlight\nBo waved!\n@highlight\nAda left'
RECORD_PLAIN = 'Ada met "Bo" in Łódź. Bo waved! Ada left'
RECORD = {
    "source": "news",
    "passage": {
        "text": RECORD_PASSAGE,
        "entities": [
            {"start": 16, "end": 19},
            {"start": 9, "end": 10},
            {"start": 0, "end": 2},
            {"start": 32, "end": 33},
        ],
    },
    "qas": [
        {
            "query": "@placeholder met Bo.",
            "answers": [{"start": 0, "end": 2, "text": "Ada"}, {"start": 53, "end": 55, "text": "Ada"}],
            "idx": 6,
        },
        {
            "query": "Ada saw @placeholder.",
            "answers": [{"start": 16, "end": 19, "text": "Łódź"}, {"start": 9, "end": 10, "text": "Bo"}],
            "idx": 7,
        },
    ],
    "idx": 2,
}

# The pronoun of the first row is the second "he", and its index that of "the"; that of the last is not in it.
WSC_TEXT = "Pam told Bob that he was late, and the helper he had left."
WSC = [
    {"text": WSC_TEXT, "target": {"span1_text": "Bob", "span1_index": 2, "span2_text": "he", "span2_index": 8}},
    {"text": WSC_TEXT, "target": {"span1_text": "Pam", "span1_index": 0, "span2_text": "He.", "span2_index": 4}},
    {"text": WSC_TEXT, "target": {"span1_text": "Pam", "span1_index": 0, "span2_text": "she", "span2_index": 4}},
]
WSC = [{**row, "idx": i, "label": i == 0} for i, row in enumerate(WSC)]
WSC_SECOND = "Pam told Bob that he was late, and the helper *he* had left."
WSC_FIRST = "Pam told Bob that *he* was late, and the helper he had left."

WMT_SOURCE = """\
<srcset setid="newstest2013" srclang="any">
<doc docid="a/1" genre="news" origlang="en">
<hl>
<seg id="1">Ann &amp; Bob, R&D: 1 < 2 <b>"no" &lt;tag&gt; &copy=3</seg>
</hl>
<p>
<seg id='2'> One sentence,
 two lines. </seg></p></doc>
</srcset>"""
WMT_REFERENCE = '<refset>\n<DOC DOCID="a/1"><SEG ID="1">A\u00a0!</SEG>\n<seg id="2">Deux</seg></DOC></refset>\n'
WMT_READ = 'Ann & Bob, R&D: 1 < 2 <b>"no" <tag> &copy=3'

# By task the files, and of every row: its id, its texts, what T5 reads, the target, what T5 has to write.
RELEASED: dict[str, tuple[dict[str, str], list[tuple]]] = {
    "mnli_matched": (
        {
            "MNLI/dev_matched.tsv": MNLI_HEADER + MNLI.format('He said "go.', 'He "went', "contradiction"),
            "MNLI/dev_mismatched.tsv": "of another task",
        },
        [("0", ('He said "go.', 'He "went'), 'mnli hypothesis: He "went premise: He said "go.', 2, "contradiction")],
    ),
    "mnli_mismatched": (
        {"MNLI/dev_mismatched.tsv": MNLI_HEADER + MNLI.format("It snows.", "It may.", "entailment")},
        [("0", ("It snows.", "It may."), "mnli hypothesis: It may. premise: It snows.", 0, "entailment")],
    ),
    "qnli": (
        {"QNLI/dev.tsv": 'index\tquestion\tsentence\tlabel\n0\tWho "won?\tThe goat" won.\tentailment\n'},
        [("0", ('Who "won?', 'The goat" won.'), 'qnli question: Who "won? sentence: The goat" won.', 0, "entailment")],
    ),
    # A byte-order mark, CRLF, empty lines, no final newline, and characters at which str.splitlines would split.
    "sst2": (
        {"SST-2/dev.tsv": '\ufeffsentence\tlabel\r\n"a\u2028joy\x85\x0b" \t1\r\n\r\nnaïve {plot}\t0\r\n   \n😀\t1'},
        [
            ("0", ('"a\u2028joy\x85\x0b" ',), 'sst2 sentence: "a\u2028joy\x85\x0b" ', 1, "positive"),
            ("1", ("naïve {plot}",), "sst2 sentence: naïve {plot}", 0, "negative"),
            ("2", ("😀",), "sst2 sentence: 😀", 1, "positive"),
        ],
    ),
    "rte": (
        {"RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tA dog.\tnot_entailment\n"},
        [("0", ("A cat.", "A dog."), "rte sentence1: A cat. sentence2: A dog.", 1, "not_entailment")],
    ),
    "mrpc": (
        {"MRPC/dev.tsv": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t10\t11\t"Yes, " he said.\tYes.\n'},
        [("0", ('"Yes, " he said.', "Yes."), 'mrpc sentence1: "Yes, " he said. sentence2: Yes.', 1, "equivalent")],
    ),
    "cola": (
        {"CoLA/dev.tsv": "xy99\t1\t\tThe bread rose.\nxy99\t0\t*\tRose bread the.\n"},
        [
            ("0", ("The bread rose.",), "cola sentence: The bread rose.", 1, "acceptable"),
            ("1", ("Rose bread the.",), "cola sentence: Rose bread the.", 0, "unacceptable"),
        ],
    ),
    "qqp": (
        {"QQP/dev.tsv": QQP},
        [
            ("0", ("How?", "Why?"), "qqp question1: How? question2: Why?", 0, "not_duplicate"),
            (
                "3",
                ("What is jam?", "What's jam?"),
                "qqp question1: What is jam? question2: What's jam?",
                1,
                "duplicate",
            ),
        ],
    ),
    "stsb": (
        {"STS-B/dev.tsv": STSB},
        [
            ("0", ("A boat.", "A ship."), "stsb sentence1: A boat. sentence2: A ship.", 3.667, "3.6"),
            ("1", ("A boat.", "An egg."), "stsb sentence1: A boat. sentence2: An egg.", 0.0, "0.0"),
        ],
    ),
    "boolq": (
        {
            "BoolQ/val.jsonl": '{"question": "is tea hot", "passage": "\\"Hot\\"\\tdrink", "idx": 4, "label": true}\n'
            '{"question": "is ice hot", "passage": "½ cold\u2028", "idx": 5, "label": false}\n'
        },
        [
            ("4", ("is tea hot", '"Hot"\tdrink'), 'boolq passage: "Hot"\tdrink question: is tea hot', 1, "True"),
            ("5", ("is ice hot", "½ cold\u2028"), "boolq passage: ½ cold\u2028 question: is ice hot", 0, "False"),
        ],
    ),
    "cb": (
        {"CB/val.jsonl": '\r\n{"premise": "A: I think so.", "hypothesis": "so", "label": "neutral", "idx": 0}\r\n'},
        [("0", ("A: I think so.", "so"), "cb hypothesis: so premise: A: I think so.", 2, "neutral")],
    ),
    "copa": (
        {"COPA/val.jsonl": COPA},
        [
            (
                "0",
                ("It fell. What happened as a result?",),
                "copa choice1: It broke. choice2: It sang. premise: It fell. question: effect",
                0,
                "False",
            ),
            (
                "1",
                ("It fell. What was the cause of this?",),
                "copa choice1: It sang. choice2: I let go. premise: It fell. question: cause",
                1,
                "True",
            ),
        ],
    ),
    "multirc": (
        {"MultiRC/val.jsonl": json.dumps(MULTIRC)},
        [
            (
                idx,
                (MULTIRC_PLAIN, f"{question} {answer}"),
                f"multirc question: {question} answer: {answer} paragraph: {MULTIRC_PLAIN}",
                label,
                str(bool(label)),
            )
            for idx, question, answer, label in (
                ("3.8.40", "Who stayed?", "Mia", 1),
                ("3.8.41", "Who stayed?", "the {rain}", 0),
                ("3.9.42", "What fell?", "Rain", 1),
            )
        ],
    ),
    "record": (
        {"ReCoRD/val.jsonl": json.dumps(RECORD)},
        [
            (
                idx,
                (RECORD_PLAIN, query),
                f"record query: {query} entities: Ada, Bo, Łódź passage: {RECORD_PLAIN}",
                answers,
                answers[0],
            )
            for idx, query, answers in (
                ("2.6", "@placeholder met Bo.", ("Ada",)),
                ("2.7", "Ada saw @placeholder.", ("Bo", "Łódź")),
            )
        ],
    ),
    "superglue_rte": (
        {"RTE/val.jsonl": '{"premise": "Kim ate.", "hypothesis": "Kim slept.", "label": "not_entailment", "idx": 1}'},
        [("1", ("Kim ate.", "Kim slept."), "rte hypothesis: Kim slept. premise: Kim ate.", 1, "not_entailment")],
    ),
    "wic": (
        {
            "WiC/val.jsonl": '{"word": "bank", "sentence1": "Wet banks.", "sentence2": "A bank lends.", "idx": 0, '
            '"label": false, "start1": 4, "start2": 2, "end1": 9, "end2": 6, "version": 1.1}\n'
        },
        [
            (
                "0",
                ("bank: Wet banks.", "A bank lends."),
                "wic sentence1: Wet banks. sentence2: A bank lends. word: bank",
                0,
                "False",
            )
        ],
    ),
    "wsc": (
        {"WSC/val.jsonl": "\n".join(map(json.dumps, WSC))},
        [
            ("0", (WSC_SECOND, "Bob"), f"wsc: {WSC_SECOND}", 1, "Bob"),
            ("1", (WSC_FIRST, "Pam"), f"wsc: {WSC_FIRST}", 0, ""),
            ("2", (WSC_TEXT, "Pam"), f"wsc: {WSC_TEXT}", 0, ""),
        ],
    ),
    "wmt_en_de": (
        {"dev/newstest2013.en": "One.\r\n\nThree\u2028.", "dev/newstest2013.de": "Eins.\n\nDrei.\n"},
        [
            ("0", ("One.",), "translate English to German: One.", ("Eins.",), "Eins."),
            ("1", ("",), "translate English to German: ", ("",), ""),
            ("2", ("Three\u2028.",), "translate English to German: Three\u2028.", ("Drei.",), "Drei."),
        ],
    ),
    "wmt_en_fr": (
        {"dev/newstest2013-src.en.sgm": WMT_SOURCE, "dev/newstest2013-ref.fr.sgm": WMT_REFERENCE},
        [
            ("a/1:1", (WMT_READ,), f"translate English to French: {WMT_READ}", ("A\u00a0!",), "A\u00a0!"),
            (
                "a/1:2",
                ("One sentence, two lines.",),
                "translate English to French: One sentence, two lines.",
                ("Deux",),
                "Deux",
            ),
        ],
    ),
    # Segments that nothing closes.
    "wmt_en_ro": (
        {
            "dev/newsdev2016-enro-src.en.sgm": '<doc docid="d"><seg id="1">Hi.<seg id="2">Bye.',
            "dev/newsdev2016-enro-ref.ro.sgm": '<doc docid="d"><seg id="1">Salut.</seg><seg id="2">Țin</doc>',
        },
        [
            ("d:1", ("Hi.",), "translate English to Romanian: Hi.", ("Salut.",), "Salut."),
            ("d:2", ("Bye.",), "translate English to Romanian: Bye.", ("Țin",), "Țin"),
        ],
    ),
}


def write(folder: Path, files: dict[str, str], flat: bool = False) -> Path:
    """The files under their released names, `flat` without their subfolder."""
    for name, text in files.items():
        path = folder / (name.rsplit("/", 1)[-1] if flat else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder
