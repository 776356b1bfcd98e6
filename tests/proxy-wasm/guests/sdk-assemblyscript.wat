;; The imports and the start-up of AssemblyScript: nothing but a start section.
(module
  (import "wasi_unstable" "proc_exit" (func $proc_exit (param i32)))
  (import "env" "proxy_log" (func $proxy_log (param i32 i32 i32) (result i32)))
  (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 4)
  (global $top (mut i32) (i32.const 65536))
  (global $started (mut i32) (i32.const 0))
  (func (export "proxy_abi_version_0_2_0"))
  (func (export "malloc") (param i32) (result i32)
    (global.get $top)
    (global.set $top (i32.add (global.get $top) (local.get 0))))
  (func $expect (param i32 i32) (if (i32.ne (local.get 0) (local.get 1)) (then unreachable)))
  (func $boot
    (global.set $started (i32.const 1)))
  (start $boot)
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (call $expect (global.get $started) (i32.const 1))
    (drop (call $proxy_log (i32.const 2) (i32.const 1024) (i32.const 7)))
    (drop (call $add (i32.const 0) (i32.const 1040) (i32.const 7) (i32.const 1024) (i32.const 7)))
    (i32.const 0))
  (data (i32.const 1024) "started") (data (i32.const 1040) "x-shape")
  ;; An iovec for "hello\n"
  (data (i32.const 1100) "\60\04\00\00\06\00\00\00") (data (i32.const 1120) "hello\0a"))
