(func (export "_start") (call $log @start@))
(func (export "main") (param i32 i32) (result i32) (call $log @main@) #0)
