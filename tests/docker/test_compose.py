"""The images and the Compose file: what can be read off them, everywhere, and what they do, where that is asked for.

What they do takes minutes, a Docker engine and the images of RabbitMQ and Python:

    RPCQ_TEST_DOCKER=1 python -m pytest tests/docker
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rpcq import url

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OBSERVE = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["observe"]}
"""What watches the others, if the profile is asked for."""
SYSTEM = {name: service for name, service in SERVICES.items() if name not in OBSERVE}
SHOP: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "shop.yml").read_text("utf-8"))["services"]
"""The example shop, if the profile is asked for."""
# Its services, as they are in examples/shop/setup.py, which would choose its database when it is imported.
SHOP_NAMES: tuple[str, ...] = ast.literal_eval(
    re.findall(r"^NAMES = (.+)$", (ROOT / "examples" / "shop" / "setup.py").read_text("utf-8"), re.MULTILINE)[0]
)
SHOP_OWN = {name: service for name, service in SHOP.items() if name != "shop-database"}
SECRETS: dict[str, Any] = {
    name: yaml.safe_load((ROOT / "docker" / f"{name}.yml").read_text("utf-8")) for name in ("password", "password-file")
}
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
START = ROOT / "docker" / "start.py"

ASKED = bool(os.environ.get("RPCQ_TEST_DOCKER"))
SECONDS = 180
"""For one command of Docker's: a first build downloads what it needs, and RabbitMQ takes its time to start."""
UP = ("up", "--no-color", "--no-build", "--exit-code-from", "producer")

engine = pytest.mark.skipif(
    not ASKED, reason="takes minutes and a Docker engine: RPCQ_TEST_DOCKER=1 python -m pytest tests/docker"
)


def instructions(name: str) -> list[str]:
    """The arguments of an instruction of the Dockerfile, from the first to the last."""
    return re.findall(rf"^{name} +(.+?) *$", DOCKERFILE, re.MULTILINE)


# What can be read off them.


def test_there_are_a_broker_two_consumers_a_producer_and_its_web_form() -> None:
    assert set(SYSTEM) == {"rabbitmq", "consumer", "producer", "web"}
    assert not any("profiles" in service for service in SYSTEM.values())
    assert SERVICES["rabbitmq"]["image"] == "rabbitmq:4.0-management"
    assert SERVICES["consumer"]["deploy"]["replicas"] == 2
    for name in ("consumer", "producer"):
        assert SERVICES[name]["build"] == {"context": ".", "dockerfile": "docker/Dockerfile", "target": name}
    assert SERVICES["web"]["build"] == SERVICES["producer"]["build"]
    assert SERVICES["web"]["command"][:2] == ["producer_service", "serve"]


def test_our_own_containers_write_nothing_and_have_no_privilege() -> None:
    for service in (*(SERVICES[name] for name in ("consumer", "producer", "web")), *SHOP_OWN.values()):
        confined = {key: service[key] for key in ("read_only", "cap_drop", "security_opt")}
        assert confined == {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def test_a_consumer_and_the_page_wait_for_the_broker_and_the_producer_for_broker_and_consumer() -> None:
    healthy = {"condition": "service_healthy"}
    assert SERVICES["consumer"]["depends_on"] == {"rabbitmq": healthy}
    assert SERVICES["producer"]["depends_on"] == {"rabbitmq": healthy, "consumer": healthy}
    assert SERVICES["web"]["depends_on"] == {"rabbitmq": healthy}
    for name in ("rabbitmq", "consumer", "web"):
        assert {"test", "interval", "timeout", "retries", "start_period"} <= set(SERVICES[name]["healthcheck"])


def test_the_broker_is_healthy_when_its_port_is_open_and_a_replica_when_it_answers_itself() -> None:
    assert SERVICES["rabbitmq"]["healthcheck"]["test"][-2:] == ["check_port_listener", "5672"]
    assert 'rpcq ping echo --worker "$$HOSTNAME"' in SERVICES["consumer"]["healthcheck"]["test"][1]


def test_the_page_is_healthy_when_it_is_alive_whatever_the_broker_is() -> None:
    how, *command = SERVICES["web"]["healthcheck"]["test"]
    assert (how, command[:2]) == ("CMD", ["python", "-c"])
    assert "http://127.0.0.1:8000/livez" in command[2]
    compile(command[2], "healthcheck", "exec")


def test_credentials_are_required_of_the_environment_and_stand_in_no_file() -> None:
    given = {
        value
        for service in SYSTEM.values()
        for name, value in service["environment"].items()
        if "USER" in name or "PASS" in name
    }
    (user,) = (value for value in given if re.fullmatch(r"\$\{RABBITMQ_USER:\?[^}]+\}", value))
    assert given - {user} == {"${RABBITMQ_PASSWORD:-}", "/run/secrets/rabbitmq_password"}
    assert re.fullmatch(r"\$\{RABBITMQ_PASSWORD:\?[^}]+\}", SECRETS["password"]["x-required"])
    files = [ROOT / "docker-compose.yml", *(ROOT / "docker" / f"{name}.yml" for name in (*SECRETS, "shop"))]
    for text in (*(file.read_text("utf-8") for file in files), DOCKERFILE):
        assert not re.search(r"amqps?://[^/\s{]*:", text)
        assert "guest" not in text
    assert not (set(instructions("ARG")) | set(instructions("ENV"))) & {"RABBITMQ_PASSWORD", "RPCQ_URL"}


def test_the_password_is_a_secret_of_every_container_which_is_empty_unless_a_file_is_named() -> None:
    included, _ = COMPOSE["include"]
    assert included == {"path": "docker/password${RABBITMQ_PASSWORD_FILE:+-file}.yml", "project_directory": "."}
    assert SECRETS["password"]["secrets"] == {"rabbitmq_password": {"file": "/dev/null"}}
    assert SECRETS["password-file"] == {"secrets": {"rabbitmq_password": {"file": "${RABBITMQ_PASSWORD_FILE}"}}}
    for service in (*SYSTEM.values(), *SHOP_OWN.values()):
        assert service["secrets"] == ["rabbitmq_password"]
    assert not any("secrets" in service for service in OBSERVE.values())


def test_the_profile_observe_has_prometheus_and_grafana_in_fixed_versions_and_without_privilege() -> None:
    assert set(OBSERVE) == {"prometheus", "grafana"}
    for service in OBSERVE.values():
        assert re.fullmatch(r"(prom|grafana)/\w+:v?\d+\.\d+\.\d+", service["image"])
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert all(volume.endswith(":ro") for volume in service["volumes"])
    # Nobody needs a password, so the one that everybody knows must not work.
    assert OBSERVE["grafana"]["environment"]["GF_AUTH_BASIC_ENABLED"] == "false"
    assert OBSERVE["grafana"]["environment"]["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_the_profile_shop_has_a_container_for_each_service_and_starts_them_when_tables_and_queues_are_there() -> None:
    assert COMPOSE["include"][1] == {"path": "docker/shop.yml", "project_directory": "."}
    assert {name for name, service in SHOP.items() if service["profiles"] == ["shop"]} == set(SHOP)
    for name in SHOP_NAMES:
        assert SHOP[f"shop-{name}"]["command"] == ["rpcq", "worker", f"examples.shop.{name}:{name}"]
    assert set(SHOP_OWN) == {"shop", "shop-setup", *(f"shop-{name}" for name in SHOP_NAMES)}
    for name, service in SHOP_OWN.items():
        assert service["build"] == {"context": ".", "dockerfile": "docker/Dockerfile", "target": "shop"}
        assert service["restart"] == ("no" if name == "shop-setup" else "unless-stopped")
        if name != "shop-setup":
            assert service["depends_on"]["shop-setup"] == {"condition": "service_completed_successfully"}


def test_the_database_of_the_shop_without_a_password_can_be_reached_by_the_shop_alone() -> None:
    database = SHOP["shop-database"]
    assert re.fullmatch(r"postgres:\d+-alpine", database["image"])
    assert (database["networks"], "ports" in database) == (["shop"], False)
    assert {name for name, service in SHOP.items() if "shop" in service["networks"]} == set(SHOP)


def test_what_serves_is_started_again_and_what_ends_by_itself_is_not() -> None:
    assert {name: service["restart"] for name, service in SERVICES.items()} == {
        "rabbitmq": "unless-stopped",
        "consumer": "unless-stopped",
        "web": "unless-stopped",
        "producer": "no",
        "prometheus": "unless-stopped",
        "grafana": "unless-stopped",
    }


def test_ports_are_open_to_this_machine_alone_and_can_be_moved() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 5
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{(?:RABBITMQ_\w*|WEB_|PROMETHEUS_|GRAFANA_)PORT:-(\d+)\}:\1", port)
    assert SHOP["shop"]["ports"] == ["127.0.0.1:${SHOP_PORT:-8001}:8000"]


def test_every_image_from_elsewhere_has_a_version_and_the_dockerfile_needs_no_other_frontend() -> None:
    stages = {line.split(" AS ")[1] for line in instructions("FROM")}
    elsewhere = [line.split(" AS ")[0] for line in instructions("FROM") if line.split(" AS ")[0] not in stages]
    assert elsewhere == ["python:3.13-slim"]
    assert "latest" not in DOCKERFILE
    assert "syntax=" not in DOCKERFILE


def test_the_layer_of_the_dependencies_knows_of_the_project_only_its_metadata() -> None:
    before = DOCKERFILE.partition("pip --python /venv/bin/python install --requirement")[0]
    assert re.findall(r"^COPY +(.+?) *$", before, re.MULTILINE) == ["pyproject.toml ./"]


def test_the_images_run_python_itself_as_a_numbered_user_who_is_not_root() -> None:
    assert [user for user in instructions("USER") if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)] == []
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index(" AS consumer") < DOCKERFILE.index(" AS producer")
    (entrypoint,) = (json.loads(line) for line in instructions("ENTRYPOINT"))
    assert entrypoint == ["env", "--block-signal=TERM", "python", "/app/start.py"]
    assert all(isinstance(json.loads(line), list) for line in instructions("CMD"))


def test_the_builder_is_sent_only_what_the_images_are_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    for pattern in patterns:
        if pattern.startswith("!"):
            assert (ROOT / pattern[1:]).exists()
    copied = {source for line in instructions("COPY") if not line.startswith("--from") for source in line.split()[:-1]}
    assert {f"!{source}" for source in copied} <= set(patterns)


# What starts in them.


@pytest.fixture
def start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start", START)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("password", ["plain", "p@ss:w/o?r#d", "100%41", "a b&c+d=e", "ключ", "[::1]"])
def test_any_password_arrives_in_the_url_as_it_is(start: ModuleType, password: str) -> None:
    environ = {"RABBITMQ_USER": "ada@work", "RABBITMQ_PASSWORD": password}
    start.prepare(environ, "here")
    parsed = url.parse(environ["RPCQ_URL"])
    assert (parsed.user, parsed.password, parsed.hosts, parsed.vhost) == (
        "ada@work",
        password,
        (("rabbitmq", 5672),),
        "/",
    )


@pytest.mark.parametrize("password", ["plain", "p@ss:w/o?r#d", " a b\t"])
def test_the_password_in_a_file_beats_the_variable_unless_the_file_is_empty(
    start: ModuleType, password: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    environ = {"RABBITMQ_USER": "ada", "RABBITMQ_PASSWORD": "in-the-variable", "RABBITMQ_PASSWORD_FILE": str(file)}
    for text, wanted in ((f"{password}\n", password), (password, password), ("\n", "in-the-variable")):
        file.write_text(text)
        found = dict(environ)
        start.prepare(found, "here")
        assert url.parse(found["RPCQ_URL"]).password == wanted


def test_a_file_for_the_password_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    environ = {**os.environ, "RABBITMQ_USER": "ada", "RABBITMQ_PASSWORD_FILE": str(tmp_path / "nowhere")}
    environ = {name: value for name, value in environ.items() if not name.startswith("RPCQ_URL")}
    ran = subprocess.run(
        [sys.executable, str(START), "rpcq", "--version"], env=environ, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("RABBITMQ_PASSWORD_FILE must name a file that user ")
    assert f"'{tmp_path / 'nowhere'}'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_file_with_the_url_is_left_to_rpcq(start: ModuleType) -> None:
    environ = {"RPCQ_URL_FILE": "/run/secrets/url", "RPCQ_NAME": "mine", "RABBITMQ_USER": "ada"}
    before = dict(environ)
    start.prepare(environ, "here")
    assert environ == before  # rpcq refuses to have both


def test_what_is_set_already_stays_and_without_credentials_there_is_no_url(start: ModuleType) -> None:
    environ = {"RPCQ_URL": "amqp://there/", "RPCQ_NAME": "mine", "RABBITMQ_USER": "ada", "RABBITMQ_PASSWORD": "x"}
    before = dict(environ)
    start.prepare(environ, "here")
    assert environ == before
    environ = {}
    start.prepare(environ, "here")
    assert environ == {"RPCQ_NAME": "here"}


STILL_STARTING = """
import time
print("up", flush=True)
time.sleep(30)
"""

KNOWS_ONLY_CTRL_C = """
import asyncio, sys

async def main():
    print("up", flush=True)
    await asyncio.sleep(30)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the images run Linux, and this is about its signals")
@pytest.mark.parametrize(
    ("program", "code"),
    [(STILL_STARTING, 128 + signal.SIGTERM), (KNOWS_ONLY_CTRL_C, 130)],
    ids=["still-starting", "knows-only-ctrl-c"],
)
def test_sigterm_ends_a_program_that_does_not_handle_it(tmp_path: Path, program: str, code: int) -> None:
    (tmp_path / "program.py").write_text(program, "utf-8")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(START), "program"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (code, "")


# What they do.


class Stack:
    """A Compose project of its own: nothing of it can be in the way of another, and nothing of it stays."""

    def __init__(self) -> None:
        self.name = f"rpcq-test-{secrets.token_hex(4)}"
        # The file by its name: with a project's alone, Compose looks at what runs, and misses who waits for whom.
        self.command = ("compose", "--project-name", self.name, "--file", "docker-compose.yml")
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RPCQ_", "PRODUCER_"))},
            "RABBITMQ_USER": "ada",
            "RABBITMQ_PASSWORD": f"%41?#&${secrets.token_hex(8)}",  # all that a URL would have quoted
            "RABBITMQ_PORT": "0",
            "RABBITMQ_MANAGEMENT_PORT": "0",
            "WEB_PORT": "0",
            "SHOP_PORT": "0",
        }

    def docker(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def done(self, *arguments: str) -> str:
        """What a command printed that has to succeed."""
        ran = self.docker(*arguments)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    def up(self, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The whole thing in the foreground, until the producer ends."""
        return self.docker(*self.command, *UP, *options, **environ)

    def compose(self, *arguments: str) -> str:
        return self.done(*self.command, *arguments)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def image(self, service: str) -> str:
        return f"{self.name}-{service}"

    def seconds_to_stop(self, container: str) -> tuple[float, int]:
        """Send SIGTERM; seconds until the container is gone, and its exit code."""
        began = time.monotonic()
        self.done("kill", "--signal", "TERM", container)
        code = int(self.done("wait", container))
        return time.monotonic() - began, code


@pytest.fixture(scope="module")
def images() -> Iterator[Stack]:
    """All images, built; taken away at the end."""
    stack = Stack()
    if stack.docker("info").returncode:
        pytest.fail("RPCQ_TEST_DOCKER is set, and no Docker engine answers: see `docker info`", pytrace=False)
    try:
        stack.compose("--profile", "shop", "build")
        yield stack
    finally:
        stack.compose("--profile", "shop", "down", "--volumes", "--remove-orphans", "--rmi", "local")


@pytest.fixture
def stack(images: Stack) -> Iterator[Stack]:
    """The project, with nothing running before and after."""
    yield images
    images.compose("--profile", "shop", "down", "--volumes", "--remove-orphans")


def assert_all_matched(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"sent +│ 10,000 ", ran.stdout), ran.stdout
    assert re.search(r"matched +│ 10,000 ", ran.stdout), ran.stdout


@engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("service", ["consumer", "producer"])
def test_an_image_has_an_ordinary_user_uvloop_and_no_compiler(images: Stack, service: str) -> None:
    def inside(code: str) -> str:
        return images.done("run", "--rm", "--entrypoint", "python", images.image(service), "-c", code).strip()

    assert int(inside("import os; print(os.getuid())")) > 0
    assert inside("import uvloop, rpcq; print(rpcq.__file__)").startswith("/venv/")
    compilers = "('gcc', 'cc', 'g++', 'c++', 'clang', 'make', 'ld', 'cargo')"
    assert inside(f"import shutil; print([it for it in {compilers} if shutil.which(it)])") == "[]"
    assert inside("import os; print(os.path.exists('/venv/bin/pip'), os.path.exists('/root/.cache'))") == "False False"
    assert inside("import os; print([it for it in ('/app', '/venv') if os.access(it, os.W_OK)])") == "[]"


@engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("missing", ["RABBITMQ_USER", "RABBITMQ_PASSWORD"])
def test_without_credentials_nothing_starts_and_the_message_says_what_to_set(stack: Stack, missing: str) -> None:
    ran = stack.up(**{missing: ""})
    assert ran.returncode != 0
    assert f"export {missing}=" in ran.stdout
    assert stack.done("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={stack.name}") == ""


@engine
def test_compose_reads_the_profile_observe(stack: Stack) -> None:
    assert set(stack.compose("--profile", "observe", "config", "--services").split()) == set(SERVICES)
    assert set(stack.compose("config", "--services").split()) == set(SYSTEM)


@engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--scale", "consumer=4")], ids=["two-consumers", "four-consumers"])
def test_up_exits_0_when_every_request_got_its_own_answer(stack: Stack, options: tuple[str, ...]) -> None:
    ran = stack.up(*options)
    assert_all_matched(ran)
    assert ran.stdout.count('"worker started"') == (4 if options else 2)


@engine
@pytest.mark.timeout(600)
def test_up_exits_0_with_the_password_in_a_secret_which_no_containers_settings_have(
    stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("%41?#&$x y'\"\n")
    file.chmod(0o644)
    assert_all_matched(stack.up(RABBITMQ_PASSWORD="", RABBITMQ_PASSWORD_FILE=str(file)))
    for service in SYSTEM:
        for container in stack.compose("ps", "--all", "--quiet", service).split():
            assert "%41" not in stack.done("inspect", container)


@engine
@pytest.mark.timeout(600)
def test_a_consumer_that_ends_by_itself_is_started_again(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--wait", "--scale", "consumer=1", "rabbitmq", "consumer")
    (container,) = stack.containers("consumer")
    state = "{{.RestartCount}} {{.State.Running}}"
    assert stack.done("inspect", "--format", state, container).strip() == "0 true"
    # `docker kill` would count as stopped by hand.
    stack.done("exec", container, "python", "-c", "import os, signal; os.kill(1, signal.SIGTERM)")
    deadline = time.monotonic() + SECONDS
    while stack.done("inspect", "--format", state, container).strip() != "1 true":
        assert time.monotonic() < deadline
        time.sleep(0.5)


@engine
@pytest.mark.timeout(600)
def test_up_exits_0_with_consumers_that_start_20_s_later(stack: Stack, tmp_path: Path) -> None:
    command = ["docker", *stack.command, *UP, "--scale", "consumer=0"]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=ROOT, env=stack.environ, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ) as process,
    ):
        try:
            deadline = time.monotonic() + SECONDS
            while not stack.containers("producer"):
                assert process.poll() is None, log.read_text("utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.5)
            time.sleep(20)
            assert process.poll() is None, log.read_text("utf-8")
            stack.compose(
                "up", "--detach", "--no-build", "--no-deps", "--no-recreate", "--scale", "consumer=2", "consumer"
            )
            process.wait(SECONDS)
        finally:
            process.terminate()
    assert_all_matched(subprocess.CompletedProcess(command, process.returncode, log.read_text("utf-8")))


@engine
@pytest.mark.timeout(600)
def test_up_does_not_exit_0_when_nobody_answers(stack: Stack) -> None:
    ran = stack.up("--scale", "consumer=0", PRODUCER_WAIT="3")
    assert ran.returncode == 2, ran.stdout
    assert "no worker of 'echo'" in ran.stdout


@engine
@pytest.mark.timeout(600)
def test_the_health_check_of_a_replica_is_about_that_replica_alone(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--wait", "consumer")
    stuck, well = stack.containers("consumer")
    kind, check = SERVICES["consumer"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"

    def checked(container: str) -> int:
        return stack.docker("exec", container, "sh", "-c", check.replace("$$", "$")).returncode

    assert (checked(stuck), checked(well)) == (0, 0)
    stack.done("kill", "--signal", "STOP", stuck)
    assert checked(stuck) != 0
    assert checked(well) == 0
    stack.done("kill", "--signal", "CONT", stuck)
    assert checked(stuck) == 0


@engine
@pytest.mark.timeout(600)
def test_the_page_is_served_and_its_requests_are_answered_by_the_consumers(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--wait", "consumer", "web")
    where = f"http://{stack.compose('port', 'web', '8000').strip()}"
    with urllib.request.urlopen(f"{where}/", timeout=SECONDS) as response:
        assert response.headers["content-type"].startswith("text/html")
    messages = json.dumps({"messages": [f"hello {number}" for number in range(100)]}).encode()
    request = urllib.request.Request(f"{where}/process", messages, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        answers = json.load(response)["answers"]
    assert [it["answer"] for it in answers] == [f"Consumer processed: hello {number}" for number in range(100)]
    (container,) = stack.containers("web")
    seconds, code = stack.seconds_to_stop(container)
    assert (seconds < 2, code) == (True, 0), seconds


@engine
@pytest.mark.timeout(900)
def test_the_shop_takes_orders_while_payment_is_killed_and_does_them_all_when_it_is_back(stack: Stack) -> None:
    shop = "--profile", "shop"
    stack.compose(*shop, "up", "--detach", "--no-build", "--wait", "shop")
    where = f"http://{stack.compose(*shop, 'port', 'shop', '8000').strip()}"

    def order() -> None:
        body = json.dumps({"customer": "ada@example.org", "article": "tea", "count": 1}).encode()
        request = urllib.request.Request(f"{where}/orders", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            assert response.status == 202

    def states() -> dict[str, int]:
        with urllib.request.urlopen(f"{where}/state", timeout=SECONDS) as response:
            found: dict[str, int] = json.load(response)["books"]["orders"]
        return found

    def wait_for(wanted: dict[str, int]) -> None:
        until = time.monotonic() + 120
        while (found := states()) != wanted:
            assert time.monotonic() < until, found
            time.sleep(0.2)

    for _ in range(5):
        order()
    wait_for({"done": 5})
    stack.compose(*shop, "kill", "shop-payment")
    for _ in range(5):
        order()
    assert states() == {"done": 5, "placed": 5}
    stack.compose(*shop, "start", "shop-payment")
    wait_for({"done": 10})


@engine
@pytest.mark.timeout(600)
def test_both_images_stop_within_a_second_of_sigterm(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--wait", "consumer")
    idle, busy = stack.containers("consumer")
    seconds, code = stack.seconds_to_stop(idle)
    assert (seconds < 1, code) == (True, 0), seconds
    stack.compose(
        "run", "--detach", "--name", f"{stack.name}-load", "producer", "producer_service", "--requests=10000000"
    )
    time.sleep(3)
    seconds, code = stack.seconds_to_stop(busy)
    assert (seconds < 1, code) == (True, 0), seconds
    seconds, code = stack.seconds_to_stop(f"{stack.name}-load")
    assert (seconds < 1, code) == (True, 130), seconds


@engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("service", "command"),
    [("consumer", ()), ("producer", ("producer_service", "--requests=10000000"))],
    ids=["consumer", "producer"],
)
def test_an_image_that_is_still_starting_stops_within_a_second_of_sigterm(
    images: Stack, service: str, command: tuple[str, ...]
) -> None:
    for delay in (0.0, 0.1, 0.2, 0.4, 0.8):  # Python starts, imports, runs
        options = ("run", "--detach", "--env", "RPCQ_URL=memory://", images.image(service))
        container = images.done(*options, *command).strip()
        try:
            time.sleep(delay)
            seconds, _ = images.seconds_to_stop(container)
            assert seconds < 1, delay
        finally:
            images.done("rm", "--force", container)
