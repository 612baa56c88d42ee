def build_config() -> dict[str, str]: ...

class Mailbox:
    def __init__(self, library: str, device: int) -> None: ...
    def read(
        self,
        mask: int,
        item_bytes: int,
        is_float: bool,
        row_stride: int,
        col_stride: int,
        columns: int,
        order: int,
        order_stride: int,
        rows: int,
        n_routed: int,
        seconds: float,
    ) -> tuple[int, int]: ...
