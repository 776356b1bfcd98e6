(global $started (mut i32) #0)
(func $boot (global.set $started (i32.add (global.get $started) #1)))
(start $boot)
(on request_headers (call $num @started@ (global.get $started)) #0)
