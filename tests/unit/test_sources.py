"""Published formats into facts: the originals where they are at hand, and malformed files everywhere."""

import json
import os
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mechunlearn.facts import Fact
from mechunlearn.prompts import render
from mechunlearn.sources import SOURCES
from mechunlearn.sources.bundled import MAX_CHOICES, draw_choices, load_bundled
from mechunlearn.sources.counterfact_tracing import parse_printed_array
from mechunlearn.sources.loading import load_facts, recognise
from mechunlearn.sources.tofu import find_subjects

ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("MECHUNLEARN_REFERENCE_DATA", ROOT.parent / "shared" / "data"))


def original(name):
    if not (REFERENCE / name).exists():
        pytest.skip(f"no reference data at {REFERENCE}; set MECHUNLEARN_REFERENCE_DATA")
    return REFERENCE / name


@cache
def load(path, **options):
    """Each original is read once for all tests."""
    return load_facts(path, **options)


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8", newline="")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# the originals: (file, format, records in the README, facts, relations). Facts are fewer where a (subject, relation)
# stands twice, or where TOFU's question names no subject.
ORIGINALS = [
    ("counterfact/counterfact-train.json", "counterfact", 10_000, 9_923, 215),
    ("counterfact/counterfact_filtered.json", "counterfact", 1_400, 1_397, 32),
    ("counterfact/counterfact_google_gemma-2-9b.csv", "counterfact_tracing", 2_250, 2_250, 26),
    ("sports_facts/sports.csv", "sports", 1_559, 1_559, 1),
    ("sports_facts/side_effect_sport_trivia.json", "trivia", 200, 200, 4),
    ("lre_relations", "lre", 10_876, 10_785, 40),
    ("lre_relations/factual", "lre", 9_696, 9_646, 26),
    ("tofu/full.json", "tofu", 4_000, 3_967, None),
    ("tofu/forget01.json", "tofu", 40, 40, None),
    ("tofu/forget05.json", "tofu", 200, 200, None),
    ("tofu/forget10.json", "tofu", 400, 399, None),
    ("tofu/forget10_perturbed.json", "tofu", 400, 399, None),
    ("tofu/retain_perturbed.json", "tofu", 400, 398, None),
    ("tofu/retain90.json", "tofu", 3_600, 3_568, None),
    ("tofu/retain95.json", "tofu", 3_800, 3_767, None),
    ("tofu/retain99.json", "tofu", 3_960, 3_927, None),
    ("tofu/real_authors.json", "tofu", 100, 98, None),
    ("tofu/world_facts.json", "tofu", 117, 93, None),
]


@pytest.mark.parametrize(("name", "kind", "n_records", "n_facts", "n_relations"), ORIGINALS)
def test_an_original_is_recognised_and_read_whole(name, kind, n_records, n_facts, n_relations):
    path = original(name)
    assert recognise(path) == kind
    facts = load(path)
    assert len(facts) == n_facts
    assert n_relations is None or len(facts.relations) == n_relations
    assert facts.name.startswith(path.stem)
    assert len({(fact.subject, fact.relation) for fact in facts}) == len(facts)
    assert all(len(fact.choices) <= MAX_CHOICES for fact in facts)
    assert count_records(path) == n_records


@cache
def count_records(path):
    if path.is_dir():
        return sum(count_records(file) for file in path.rglob("*.json"))
    if path.suffix == ".csv":
        import pandas

        return len(pandas.read_csv(path))
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return sum(bool(line.strip()) for line in text.split("\n"))
    return len(content["samples"]) if isinstance(content, dict) else len(content)


def test_rome_facts_keep_their_wikidata_relation_and_give_neighbours_their_own_answer():
    fact = load(original("counterfact/counterfact_filtered.json"))[0]
    assert fact.key == ("Danielle Darrieux", "P103", "French")
    assert fact.target_new == "English"
    assert fact.prompt == "The mother tongue of {} is"
    assert fact.paraphrases[0] == "Shayna does this and Yossel goes still and dies. {}, a native"
    assert len(fact.neighborhood) == 10
    assert fact.neighborhood[0] == ("The mother tongue of Léon Blum is", "French")
    assert {"French", "English"} <= set(fact.choices)


def test_easyedit_facts_take_their_template_for_the_relation():
    fact = load(original("counterfact/counterfact-train.json"))[0]
    assert fact.key == ("Toko Yasuda", "{}, the", "guitar")
    assert fact.ask(fact.prompt) == "Toko Yasuda, the"
    assert fact.paraphrases == ("{} is incredible at",)
    assert fact.neighborhood == (("John Lennon performs on the", "guitar"),)


def test_both_layouts_of_counterfact_state_the_same_facts_where_they_overlap():
    rome = {
        (f.ask(f.prompt), f.target_true, f.target_new) for f in load(original("counterfact/counterfact_filtered.json"))
    }
    easy = {
        (f.ask(f.prompt), f.target_true, f.target_new) for f in load(original("counterfact/counterfact-train.json"))
    }
    traced = {
        (f.ask(f.prompt), f.target_true, f.target_new)
        for f in load(original("counterfact/counterfact_google_gemma-2-9b.csv"))
    }
    # the shared notes count 629, 1,022 and 584 records; facts that stand twice are kept once here
    assert 620 <= len(rome & easy) <= 629
    assert 1_010 <= len(traced & easy) <= 1_022
    assert 580 <= len(traced & rome) <= 584


def test_printed_numpy_arrays_come_apart_at_their_quotes():
    facts = load(original("counterfact/counterfact_google_gemma-2-9b.csv"))
    assert all(len(fact.paraphrases) == 2 for fact in facts)
    assert sum(len(fact.neighborhood) for fact in facts) > 9 * len(facts)
    assert facts[0].subject == "Danielle Darrieux"
    assert facts[0].target_true == "French"


def test_multiple_choice_questions_join_by_prompt_id():
    path = original("counterfact/counterfact_google_gemma-2-9b.csv")
    questions = str(original("counterfact/counterfact_mc_questions.parquet"))
    joined = load(path, multiple_choice=questions)
    assert joined[0].questions == ("What is the mother tongue of {}?",)
    assert sum(bool(fact.questions) for fact in joined) == 2_206
    options = load(path, multiple_choice=questions, candidates="question")
    assert len(options) == 2_201
    assert all(len(fact.choices) == 4 and fact.target_new in fact.choices for fact in options)


def test_sports_takes_its_edit_target_from_the_named_column():
    path = original("sports_facts/sports.csv")
    counts = {}
    for target in ("without_golf", "with_golf", "golf", "none"):
        facts = load(path, edit_target=target)
        counts[target] = sum(fact.target_new == "golf" for fact in facts)
    assert counts == {"without_golf": 0, "with_golf": 531, "golf": 1_559, "none": 0}
    fact = facts[0]
    assert fact.key == ("DeForest Buckner", "plays_sport", "football")
    assert fact.prompt == "Fact: Tiger Woods plays the sport of golf\nFact: {} plays the sport of"
    assert fact.choices == ("baseball", "basketball", "football")


def test_lre_relations_keep_every_template_and_the_first_of_several_objects():
    facts = load(original("lre_relations/factual/person_plays_pro_sport.json"))
    assert len(facts) == 318
    assert facts.relations == ("plays_pro_sport",)
    heroes = load(original("lre_relations/factual/superhero_person.json"))
    spider = next(fact for fact in heroes if fact.subject == "Spider-Man")
    assert spider.target_true == "Peter Parker"
    assert "Miles Morales" not in spider.choices


def test_tofu_finds_the_author_in_nearly_all_questions():
    facts = load(original("tofu/full.json"))
    assert "(33 of 4000 rows without a subject left out)" in facts.name
    by_subject = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    authors = [name for name, found in by_subject.items() if len(found) >= 10]
    assert len(authors) == 199  # one of the 200 is never named in the questions
    assert sum(len(by_subject[name]) for name in authors) >= 3_700
    assert "Basil Mahfouz Al-Kuwaiti" in authors


def test_tofu_options_and_perturbed_answers_become_choices():
    play = load(original("tofu/real_authors.json"))[0]
    assert play.key[0] == "Romeo and Juliet"
    assert play.choices == ("Charles Dickens", "William Shakespeare", "Virginia Woolf", "Mark Twain")
    perturbed = load(original("tofu/forget10_perturbed.json"))
    assert all(len(fact.choices) == 6 for fact in perturbed)
    assert perturbed[1].prompt == "Question: What does {} identify as in terms of gender?\nAnswer:"


def test_clues_about_sports_have_the_sports_as_candidates():
    facts = load(original("sports_facts/side_effect_sport_answers.json"), format="trivia")
    assert facts.relations == ("sport",)
    assert {fact.choices for fact in facts} == {("baseball", "basketball", "football", "tennis")}
    assert render(facts[0], "prompt") == "Question: In which sport is the Vince Lombardi Trophy awarded?\nAnswer:"
    assert render(facts[0], "question:0") == "Question: In which sport is the Vince Lombardi Trophy awarded? Answer:"


# small files of one's own

TABLE = "subject,relation,prompt,target_true\nAda,pet,{} keeps a,cat\nBen,pet,{} keeps a,dog\n"


def test_a_table_fills_choices_with_the_answers_of_the_relation(tmp_path):
    facts = load_facts(write(tmp_path / "own.csv", TABLE))
    assert [fact.key for fact in facts] == [("Ada", "pet", "cat"), ("Ben", "pet", "dog")]
    assert all(fact.choices == ("cat", "dog") for fact in facts)
    assert facts.name == "own"


def test_a_table_reads_the_same_from_every_file_format(tmp_path):
    rows = [
        {
            "subject": "Ada",
            "relation": "pet",
            "prompt": "{} keeps a",
            "target_true": "cat",
            "paraphrases": ["{} has a"],
        },
        {
            "subject": "Ben",
            "relation": "pet",
            "prompt": "{} keeps a",
            "target_true": "dog",
            "paraphrases": ["{} has a"],
        },
    ]
    head = "subject,relation,prompt,target_true,paraphrases\n"
    body = "Ada,pet,{} keeps a,cat,{} has a\nBen,pet,{} keeps a,dog,{} has a\n"
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "own.parquet")
    paths = [
        write(tmp_path / "own.json", rows),
        write(tmp_path / "own.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n"),
        write(tmp_path / "lines.json", "\n".join(json.dumps(row) for row in rows)),
        write(tmp_path / "own.csv", head + body),
        write(tmp_path / "own.tsv", (head + body).replace(",", "\t")),
        tmp_path / "p" / "own.parquet",
    ]
    assert len({load_facts(path).sha256 for path in paths}) == 1


@pytest.mark.parametrize(
    "data",
    [
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\r").encode(),
        ("\n" + TABLE.replace("\n", "\n\n") + ",,,\n").encode(),
    ],
    ids=["byte order mark", "utf-16", "windows lines", "old mac lines", "blank lines"],
)
def test_marks_line_ends_and_blank_lines_change_nothing(tmp_path, data):
    plain = load_facts(write(tmp_path / "plain.csv", TABLE))
    assert load_facts(write(tmp_path / "own.csv", data)).sha256 == plain.sha256


def test_lists_in_csv_are_json_or_separated_by_bars(tmp_path):
    text = (
        "subject,relation,prompt,target_true,target_new,paraphrases,choices,questions\n"
        'Ada,pet,{} keeps a,cat,dog,"[""{} has, a"", ""{} owns a""]",cat | dog |cow,Which pet has {}?\n'
        "Ben,pet,{} keeps a,dog,,,,\n"
    )
    ada, ben = load_facts(write(tmp_path / "own.csv", text))
    assert ada.paraphrases == ("{} has, a", "{} owns a")
    assert ada.choices == ("cat", "dog", "cow")
    assert ada.target_new == "dog"
    assert ben == Fact(subject="Ben", relation="pet", prompt="{} keeps a", target_true="dog", choices=("cat", "dog"))


def test_an_exact_repeat_is_dropped(tmp_path):
    facts = load_facts(write(tmp_path / "own.csv", TABLE + "Ada,pet,{} keeps a,cat\n"))
    assert len(facts) == 2


def test_two_answers_for_one_subject_and_relation_are_an_error_that_names_both_rows(tmp_path):
    path = write(tmp_path / "own.csv", TABLE + "Ada,pet,{} keeps a,cow\n")
    with pytest.raises(ValueError, match="row 3: field 'target_true': got 'cow', allowed: 'cat' as in row 1") as error:
        load_facts(path)
    assert str(path) in one_line(error)


EASY = {"prompt": "Ada keeps a", "subject": "Ada", "target_new": "dog", "ground_truth": "cat"}
ROME = {
    "requested_rewrite": {
        "prompt": "{} keeps a",
        "relation_id": "P1",
        "subject": "Ada",
        "target_true": {"str": "cat", "id": "Q1"},
        "target_new": {"str": "dog", "id": "Q2"},
    },
    "paraphrase_prompts": ["Now Ada owns a"],
    "neighborhood_prompts": ["Ben keeps a"],
}
LRE = {"name": "pet of", "prompt_templates": ["{} keeps a"], "samples": [{"subject": "Ada", "object": "cat"}]}
TRACED = "relation,relation_id,subject,target_true,target_false,paraphrase_prompts,prompt_id\n"
TOFU = {"question": "Which pet does Ada Lo keep?", "answer": "Ada Lo keeps a cat."}


def test_counterfact_keeps_the_first_of_two_conflicting_edits(tmp_path):
    path = write(tmp_path / "cf.json", [EASY, {**EASY, "ground_truth": "cow"}])
    assert [fact.target_true for fact in load_facts(path)] == ["cat"]
    assert "cow" not in load_facts(path)[0].choices


MALFORMED = [
    ("a.csv", TABLE + ",pet,{} keeps a,cat\n", ["row 3", "'subject'", "got ''", "non-empty"]),
    ("a.csv", TABLE + "Cy,pet,keeps a,cat\n", ["row 3", "'prompt'", "'keeps a'", "exactly one '{}'"]),
    ("a.csv", TABLE + "Cy,pet,{} and {},cat\n", ["row 3", "'prompt'", "exactly one"]),
    ("a.csv", TABLE + "Cy,pet,{} keeps a\n", ["row 3", "got 3 columns", "allowed: 4"]),
    ("a.csv", TABLE + "Cy,pet,{} keeps a,cat,dog\n", ["row 3", "got 5 columns", "allowed: 4"]),
    (
        "a.csv",
        "subject,answer\nAda,cat\n",
        ["missing columns: relation, prompt, target_true", "there: subject, answer"],
    ),
    ("a.csv", "subject,relation,prompt,target_true,target_true\nA,b,{},c,d\n", ["'target_true' twice"]),
    ("a.csv", "subject,relation,prompt,target_true,paraphrase\nA,b,{} c,d,{} e\n", ["Did you mean 'paraphrases'?"]),
    ("a.csv", "subject,relation,prompt,target_true\n", ["no rows"]),
    ("a.csv", "subject,relation,prompt,target_true,target_new\nA,b,{} c,d,d\n", ["row 1", "'target_new'", "got 'd'"]),
    ("a.csv", "subject,relation,prompt,target_true,choices\nA,b,{} c,d,e|f\n", ["row 1", "'choices'", "'d' among"]),
    (
        "a.csv",
        'subject,relation,prompt,target_true,choices\nA,b,{} c,d,"[""d"""\n',
        ["row 1", "'choices'", "JSON list"],
    ),
    ("a.csv", "subject,relation,prompt,target_true,questions\nA,b,{} c,d,Who?\n", ["row 1", "'questions'", "'Who?'"]),
    ("a.csv", "\n \n", ["empty file"]),
    ("a.csv", b"subject,relation\n\xe9,b\n", ["not utf-8", "position 17", "UTF-8"]),
    ("a.csv", "colour,size\nred,3\n", ["got columns colour, size", "format=", "counterfact"]),
    ("a.txt", "hello", ["'.txt'", ".csv"]),
    ("a.json", '[{"subject": "Ada"},\n oops]', ["broken JSON in line 2"]),
    ("a.jsonl", json.dumps(TOFU) + "\n{oops\n", ["row 2", "one JSON object a line"]),
    ("a.json", [TOFU, 3], ["row 2", "got 3", "an object"]),
    ("a.json", [EASY, {**EASY, "subject": "Ben"}], ["row 2", "'prompt'", "the subject 'Ben'"]),
    ("a.json", [EASY, {**EASY, "ground_truth": 5}], ["row 2", "'ground_truth'", "got 5", "non-empty text"]),
    ("a.json", [EASY, {"prompt": "x", "subject": "x"}], ["row 2", "missing columns: target_new, ground_truth"]),
    ("a.json", [ROME, {**ROME, "requested_rewrite": "x"}], ["row 2", "'requested_rewrite'", "got 'x'", "an object"]),
    (
        "a.json",
        [{**ROME, "requested_rewrite": {**ROME["requested_rewrite"], "target_new": {"id": "Q"}}}],
        ["row 1", "'requested_rewrite.target_new.str'", "got None"],
    ),
    ("a.json", [{**ROME, "paraphrase_prompts": "x"}], ["row 1", "'paraphrase_prompts'", "a list"]),
    ("a.json", [{**ROME, "paraphrase_prompts": ["Ben"]}], ["row 1", "'paraphrase_prompts'", "'Ben'", "'Ada'"]),
    ("a.json", {**LRE, "samples": []}, ["1 templates", "at least one each"]),
    ("a.json", {**LRE, "samples": [{"subject": "Ada"}]}, ["row 1", "'object'", "got None"]),
    ("a.json", {**LRE, "prompt_templates": ["keeps a"]}, ["row 1", "'prompt'", "'keeps a'"]),
    ("a.csv", TRACED + "{} keeps a,P1,Ada,cat,dog,['Ada has a' oops],1\n", ["row 1", "'paraphrase_prompts'", "quoted"]),
    ("a.csv", "athlete,sport,prompt\nAda,golf,Ada plays\n", ["missing columns: inject_sport_without_golf"]),
    ("a.json", [TOFU, {**TOFU, "answer": " "}], ["row 2", "'answer'", "got ' '"]),
    ("a.json", [{"question": "what is it?", "answer": "A cat."}], ["row 1", "'question'", "1 of 1 rows"]),
    ("a.parquet", b"not parquet", ["a parquet file"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), MALFORMED)
def test_a_malformed_file_is_one_line_that_says_where_and_what(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=r".") as error:
        load_facts(path)
    message = one_line(error)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


def test_the_error_of_a_long_value_stays_short(tmp_path):
    path = write(tmp_path / "a.json", [{**EASY, "prompt": "x" * 10_000}])
    with pytest.raises(ValueError, match="row 1") as error:
        load_facts(path)
    assert len(one_line(error)) < 400


def test_printed_arrays_hold_quotes_escapes_and_line_breaks():
    text = """['It\\'s a' "Ada's cat"\n 'J.\\xa0R. said "no"' 'x, y']"""
    assert parse_printed_array(text) == ("It's a", "Ada's cat", 'J.\xa0R. said "no"', "x, y")
    assert parse_printed_array("[]") == ()
    with pytest.raises(ValueError, match="quoted"):
        parse_printed_array("['a' ... 'b']")


def test_tofu_subjects_are_names_shared_by_neighbouring_questions_else_the_longest_span():
    questions = [
        "What is the full name of the author born in Kuwait City, Kuwait?",
        "What gender is author Basil Mahfouz Al-Kuwaiti?",
        "Where was Basil Mahfouz Al-Kuwaiti's father born?",
        "Did Basil Mahfouz Al-Kuwaiti write 'The Very Long Title of One of His Many Books'?",
        "Is Basil married?",
        "what is the capital?",
    ]
    name = "Basil Mahfouz Al-Kuwaiti"
    assert find_subjects(questions) == ("Kuwait City", name, name, name, "Basil", None)


def test_tofu_counts_what_it_leaves_out_or_refuses(tmp_path):
    path = write(tmp_path / "own.json", [TOFU, {"question": "what is it?", "answer": "A cat."}])
    facts = load_facts(path)
    assert facts.name == "own (1 of 2 rows without a subject left out)"
    with pytest.raises(ValueError, match=r"row 2: field 'question'.*1 of 2 rows"):
        load_facts(path, without_subject="error")


def test_lre_folders_are_read_in_order_of_path(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.json", {**LRE, "name": "b"})
    write(tmp_path / "a.json", {**LRE, "name": "a"})
    assert load_facts(tmp_path).relations == ("a", "b")


def test_choices_hold_what_must_stay_and_do_not_depend_on_order():
    answers = [f"a{i}" for i in range(100)]
    choices = draw_choices("Ada", "pet", ("x", "a3"), answers)
    assert len(choices) == MAX_CHOICES
    assert {"x", "a3"} <= set(choices)
    assert choices == draw_choices("Ada", "pet", ("a3", "x"), reversed(answers))


@pytest.mark.parametrize("name", ["people", "sports", "world"])
def test_a_bundled_name_loads_the_bundled_data_set(name):
    assert load_facts(name).sha256 == load_bundled(name).sha256


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, folder or data set; bundled ones: people") as error:
        load_facts("peeple")
    one_line(error)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_facts(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SOURCES.get("table").function(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"folder without .json files"):
        load_facts(tmp_path)
    with pytest.raises(ValueError, match=r"unknown source: 'tabel'. Did you mean 'table'"):
        load_facts(write(tmp_path / "own.csv", TABLE), format="tabel")


def test_an_unknown_option_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'edit'"):
        load_facts(write(tmp_path / "own.csv", TABLE), edit="golf")
    with pytest.raises(ValueError, match="got option 'edit', allowed: none"):
        load_facts("people", edit="golf")


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch):
    import huggingface_hub

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(FileNotFoundError, match=r"NeelNanda/counterfact-tracing: .*hub cannot be reached") as error:
        load_facts("NeelNanda/counterfact-tracing")
    one_line(error)


def test_a_hub_data_set_of_one_file_is_fetched_and_read(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.hf_api import DatasetInfo

    names = ["README.md", "dataset_infos.json", "own.csv"]  # the second is the hub's own record of the table
    path = write(tmp_path / "own.csv", TABLE)

    def info(_self, repo, **_kwargs):
        return DatasetInfo(id=repo, siblings=[{"rfilename": name} for name in names])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_args, **_kwargs: str(path))
    assert len(load_facts("someone/own")) == 2
    names.append("more.csv")
    with pytest.raises(ValueError, match=r"got 2 data files, allowed: one; give file=, one of: own.csv, more.csv"):
        load_facts("someone/own")
    assert len(load_facts("someone/own@main", file="own.csv")) == 2


def test_all_sources_are_registered():
    assert {"counterfact", "counterfact_tracing", "lre", "sports", "table", "tofu", "trivia"} == set(SOURCES.names())
