(import "wasi_snapshot_preview1" "fd_write" (func $write1 (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $write2 (param i32 i32 i32 i32) (result i32)))
(func $text (param $text i32) (param $size i32)
  (i32.store #16 (local.get $text))
  (i32.store #20 (local.get $size)))
(on request_headers
  (call $text @one\0a@) (call $say @first@ (call $write1 #1 #16 #1 #24))
  (call $text @two\0a@) (call $say @second@ (call $write2 #1 #16 #1 #24))
  #0)
