"""What the tests of the pages share: what a person does in a browser."""

MARKUP = "<script>alert(1)</script>"


class Tab:
    """A page with the chat, and what a person does with it."""

    def __init__(self, context, address: str, is_ready: str = "#notice:empty") -> None:
        """context: of the browser, see new_context(); is_ready: what the page then shows."""
        self.context = context
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.requests, self.troubles = [], []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("console", lambda message: self.troubles.append(message.text))
        self.tab.on("dialog", lambda dialog: (self.troubles.append(dialog.message), dialog.dismiss()))
        self.tab.goto(address)
        self.tab.wait_for_selector(is_ready, state="attached")

    def set(self, **settings: str) -> "Tab":
        """Set fields by their ids; mode by its value."""
        self.tab.click("#settings-button")
        for name, value in settings.items():
            if name == "mode":
                self.tab.check(f'[name="mode"][value="{value}"]')
            else:
                self.tab.fill("#" + name.replace("_", "-"), value)
        self.tab.click("#close")
        return self

    def start(self, question: str) -> None:
        self.tab.fill("#question", question)
        self.tab.press("#question", "Enter")

    def ask(self, question: str) -> str:
        """The answer's text, once it is complete."""
        self.start(question)
        self.tab.wait_for_selector("#stop", state="hidden")
        assert self.notice == "", self.notice
        return self.tab.locator(".answer").last.text_content()

    def ask_anew(self, question: str) -> str:
        self.tab.click("#new")
        return self.ask(question)

    def below(self) -> list[str]:
        """The lines below the last answer."""
        return self.tab.locator(".turn").last.locator(".below").all_text_contents()

    @property
    def notice(self) -> str:
        return self.tab.locator("#notice").text_content()

    def others(self) -> list[tuple[str, float]]:
        """What the card shows: texts and probabilities."""
        texts = self.tab.locator("#candidates .text").all_text_contents()
        shares = self.tab.locator("#candidates .percent").all_text_contents()
        return list(zip(texts, map(probability, shares), strict=True))


def probability(text: str) -> float:
    return 0.0 if text.startswith("<") else float(text.removesuffix("%")) / 100
