"""The checker of the bundled data sets: whoever changes one of their files hears from here first."""

import csv
import hashlib
import os
import re
import tomllib
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mechunlearn.organisms.people import SYLLABLES, make_people, write_people
from mechunlearn.sources.bundled import BUNDLED, MAX_CHOICES, dataset_folder, load_bundled, load_rows, load_templates

ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("MECHUNLEARN_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
MAX_MAJORITY = 0.40
N_SHUFFLES = 100
MAX_Z = 4.0  # 20 pairs; a chance excess of 4 standard deviations is about 1 in 1,000 over all of them

RELATIONS = [(name, relation) for name in BUNDLED for relation in load_templates(name)]
each_data_set = pytest.mark.parametrize("name", BUNDLED)
each_relation = pytest.mark.parametrize(("name", "relation"), RELATIONS)


def answers_of(name, relation):
    return [answer for _, other, answer in load_rows(name) if other == relation]


@each_data_set
def test_the_folder_holds_facts_templates_and_readme_and_no_code(name):
    names = {path.name for path in dataset_folder(name).iterdir()}
    assert names == {"facts.csv", "templates.toml", "README.md"}
    assert not (ROOT / "datasets" / "__init__.py").exists(), "it would shadow the Hugging Face package"


@each_data_set
def test_the_readme_states_the_sha256_of_each_file_and_the_licence(name):
    folder = dataset_folder(name)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `?([\w.]+)`? \| `([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    assert stated == {
        file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("facts.csv", "templates.toml")
    }
    assert "CC0-1.0" in readme
    assert tomllib.loads((folder / "templates.toml").read_text(encoding="utf-8"))["license"] == "CC0-1.0"


@each_data_set
def test_the_file_is_plain_utf8_with_unix_line_ends_and_three_columns(name):
    data = (dataset_folder(name) / "facts.csv").read_bytes()
    assert not data.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in data
    assert data.endswith(b"\n")
    lines = list(csv.reader(data.decode("utf-8").splitlines()))
    assert lines[0] == ["subject", "relation", "answer"]
    assert all(len(line) == 3 for line in lines)


@each_data_set
def test_no_field_is_empty_or_padded(name):
    for row in load_rows(name):
        for field in row:
            assert field, row
            assert field == " ".join(field.split()), row
            assert field == unicodedata.normalize("NFC", field), row


@each_data_set
def test_no_row_stands_twice_and_no_subject_is_spelled_in_two_ways(name):
    rows = load_rows(name)
    assert len(set(rows)) == len(rows)
    subjects = {subject for subject, _, _ in rows}
    assert len({subject.casefold() for subject in subjects}) == len(subjects)


@each_data_set
def test_rows_and_templates_name_the_same_relations(name):
    assert {relation for _, relation, _ in load_rows(name)} == set(load_templates(name))


@each_relation
def test_a_functional_relation_has_one_answer_a_subject(name, relation):
    if not load_templates(name)[relation].functional:
        pytest.skip("not functional: several answers are allowed; ends if the relation becomes functional")
    answers = defaultdict(set)
    for subject, other, answer in load_rows(name):
        if other == relation:
            answers[subject].add(answer)
    assert not {subject: found for subject, found in answers.items() if len(found) > 1}


@each_relation
def test_no_answer_is_so_frequent_that_guessing_it_looks_like_knowing(name, relation):
    counts = Counter(answers_of(name, relation))
    assert len(counts) >= 2
    assert counts.most_common(1)[0][1] <= MAX_MAJORITY * counts.total()


@each_relation
def test_answers_differ_by_more_than_case(name, relation):
    answers = set(answers_of(name, relation))
    assert len({answer.casefold() for answer in answers}) == len(answers)


@each_relation
def test_every_template_holds_the_subject_once_and_stops_before_the_answer(name, relation):
    templates = load_templates(name)[relation]
    for template in (*templates.declarative, *templates.questions):
        assert template.count("{}") == 1, template
        assert "{" not in template.replace("{}", "")
        assert template == template.strip()
    assert all(template[-1] not in ".!?:;" for template in templates.declarative)
    assert all(question.endswith("?") for question in templates.questions)
    assert all("{" not in text for text in templates.pronoun)
    assert len(set(templates.declarative)) == len(templates.declarative)
    assert len(set(templates.questions)) == len(templates.questions)


@each_relation
def test_there_are_six_prompts_three_questions_and_the_subject_stands_everywhere(name, relation):
    templates = load_templates(name)[relation]
    assert len(templates.declarative) >= 6
    assert len(templates.questions) >= 3
    assert {subject_position(template) for template in templates.declarative} == {"first", "middle", "last"}


def subject_position(template):
    """First; last where the words of the relation stand before it ("The pet of {} is a"); else in the middle."""
    before = template.split("{}")[0]
    if not before:
        return "first"
    return "last" if before.startswith("The ") else "middle"


@each_data_set
def test_no_template_gives_away_an_answer(name):
    for relation, templates in load_templates(name).items():
        for answer in set(answers_of(name, relation)):
            for template in (*templates.declarative, *templates.questions, *templates.pronoun):
                assert not re.search(rf"\b{re.escape(answer)}\b", template), (answer, template)


@each_data_set
def test_facts_carry_all_wordings_and_their_relations_answers(name):
    facts = load_bundled(name)
    assert len(facts) == len(load_rows(name))
    for fact in facts:
        answers = set(answers_of(name, fact.relation)) if fact is facts[0] else None
        assert fact.target_true in fact.choices
        assert len(fact.choices) == min(MAX_CHOICES, N_ANSWERS[name, fact.relation])
        assert answers is None or set(fact.choices) <= answers


N_ANSWERS = {(name, relation): len(set(answers_of(name, relation))) for name, relation in RELATIONS}


def test_people_holds_a_thousand_people_with_five_attributes_two_of_them_of_twenty_answers():
    rows = load_rows("people")
    by_person = Counter(subject for subject, _, _ in rows)
    relations = load_templates("people")
    assert len(by_person) >= 1000
    assert len(relations) >= 5
    assert set(by_person.values()) == {len(relations)}
    assert sum(N_ANSWERS["people", relation] >= 20 for relation in relations) >= 2


def test_the_people_file_is_what_its_generator_makes(tmp_path):
    assert load_rows("people") == make_people()
    written = write_people(tmp_path)
    assert written.read_bytes() == (dataset_folder("people") / "facts.csv").read_bytes()


def test_another_seed_makes_other_people():
    assert make_people(50, seed=1) != make_people(50, seed=2)


def test_a_persons_name_has_two_parts_and_at_least_four_invented_syllables():
    # several tokens a name under any tokenizer, so that the subject's last token is not the whole subject
    syllables = "|".join(SYLLABLES)
    for subject in {subject for subject, _, _ in load_rows("people")}:
        first, last = subject.lower().split()
        assert re.fullmatch(rf"(?:{syllables}){{2}}", first), subject
        assert re.fullmatch(rf"(?:{syllables}){{3}}", last), subject


def test_half_a_name_names_nobody():
    people = {subject for subject, _, _ in load_rows("people")}
    for part in (0, 1):
        shared = Counter(name.split()[part] for name in people)
        assert min(shared.values()) >= 10


def test_attributes_are_independent_of_names_and_of_each_other():
    rows = load_rows("people")
    people = sorted({subject for subject, _, _ in rows})
    answer = {(subject, relation): value for subject, relation, value in rows}
    columns = {relation: [answer[person, relation] for person in people] for relation in load_templates("people")}
    names = {f"name part {i}": [person.split()[i] for person in people] for i in (0, 1)}
    pairs = [(a, b) for a in names for b in columns] + list(combinations(columns, 2))
    codes = {key: np.unique(values, return_inverse=True)[1] for key, values in (names | columns).items()}
    rng = np.random.default_rng(0)
    excess = {}
    for a, b in pairs:
        shuffled = [mutual_information(codes[a], rng.permutation(codes[b])) for _ in range(N_SHUFFLES)]
        excess[a, b] = (mutual_information(codes[a], codes[b]) - np.mean(shuffled)) / np.std(shuffled)
    assert max(excess.values()) < MAX_Z, excess


def test_the_independence_check_would_see_a_dependence():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 10, 1000)
    b = np.where(rng.random(1000) < 0.15, a, rng.integers(0, 10, 1000))
    shuffled = [mutual_information(a, rng.permutation(b)) for _ in range(N_SHUFFLES)]
    assert mutual_information(a, b) - np.mean(shuffled) > MAX_Z * np.std(shuffled)


def mutual_information(a, b):
    """Plug-in estimate in nats."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    held = joint > 0
    return float((joint[held] * np.log(joint[held] / independent[held])).sum())


def test_sports_holds_four_hundred_athletes_of_five_sports():
    assert len({subject for subject, _, _ in load_rows("sports")}) >= 400
    assert N_ANSWERS["sports", "plays_sport"] >= 5


def test_sports_agrees_with_the_papers_list_where_names_overlap():
    path = REFERENCE / "sports_facts" / "sports.csv"
    if not path.is_file():
        pytest.skip(f"no reference data at {REFERENCE}; set MECHUNLEARN_REFERENCE_DATA")
    with path.open(encoding="utf-8", newline="") as file:
        theirs = {row["athlete"].casefold(): row["sport"] for row in csv.DictReader(file)}
    ours = {subject.casefold(): answer for subject, _, answer in load_rows("sports")}
    both = theirs.keys() & ours.keys()
    assert len(both) >= 100
    assert {name: (ours[name], theirs[name]) for name in both if ours[name] != theirs[name]} == {}


def test_world_holds_eight_hundred_facts_of_eight_relations_that_share_subjects():
    rows = load_rows("world")
    assert len(rows) >= 800
    assert len(load_templates("world")) >= 8
    relations = defaultdict(set)
    for subject, relation, _ in rows:
        relations[subject].add(relation)
    assert sum(len(found) >= 2 for found in relations.values()) >= 100
