(global $mode (mut i32) #0)
(on request_headers
  (if (call $path @/299@) (then (global.set $mode #1)))
  (if (call $path @/abc@) (then (global.set $mode #2)))
  (if (call $path @/removed@) (then (global.set $mode #3)))
  #0)
(on response_headers
  (call $show @status@ (call $get_header_map_value #2 @:status@ OUT))
  (if (i32.eq (global.get $mode) #1) (then (call $say @299@ (call $replace_header_map_value #2 @:status@ @299@))))
  (if (i32.eq (global.get $mode) #2) (then (call $say @abc@ (call $replace_header_map_value #2 @:status@ @abc@))))
  (if (i32.eq (global.get $mode) #3) (then (call $say @removed@ (call $remove_header_map_value #2 @:status@))))
  #0)
